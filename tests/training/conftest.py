"""Finished runs that the tests of training share, one a session."""

import pytest
from runs import config
from support import kills

import jpq


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """(config, result) of a short run of djpq on digits at 1 % of the fp32 model's BOPs."""
    asked = config(tmp_path_factory.mktemp("finished"))
    return asked, jpq.optimize(asked)


@pytest.fixture(scope="session")
def tiny_trial(tmp_path_factory):
    """Folder of a finished trial (not exported) of the smallest run, `kills.tiny_config`; for reading only."""
    return jpq.optimize(kills.tiny_config(tmp_path_factory.mktemp("tiny")), final=False).folder
