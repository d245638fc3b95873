"""Small nets on a shared machine: one thread is faster than two that wait for each other."""

import pytest
import torch

# fixtures finished_run, finished_budgets, finished_study, empty_folder, traced
pytest_plugins = ("finished", "commands", "small_sessions")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two workers (pyproject.toml's `-n auto`), none where all the tests named on the command line lie in one file."""
    files = {argument.partition("::")[0] for argument in config.args}
    return 0 if len(files) == 1 and files.pop().endswith(".py") else 2
