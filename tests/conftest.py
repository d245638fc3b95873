"""Small nets on a shared machine: one thread is faster than two that wait for each other."""

import pytest
import torch

pytest_plugins = ("finished", "commands")  # fixtures finished_run, finished_budgets, finished_study, empty_folder


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
