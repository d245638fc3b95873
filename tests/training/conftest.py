"""Finished runs that the tests of training share."""

import pytest
from runs import config

import jpq


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """(config, result) of a short run of djpq on digits at 1 % of the fp32 model's BOPs."""
    asked = config(tmp_path_factory.mktemp("finished"))
    return asked, jpq.optimize(asked)
