"""Every benchmark runs on one thread; what a module's `table(reporter)` writes stands below its tests."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_a_table(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if table := getattr(request.module, "table", None):
        plugins = request.config.pluginmanager
        with plugins.getplugin("capturemanager").global_and_fixture_disabled():
            table(plugins.getplugin("terminalreporter"))
