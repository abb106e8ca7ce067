"""Options of ``pytest benchmarks/``."""


def pytest_addoption(parser):
    parser.addoption(
        "--layers",
        help="measure the layers whose name contains one of these words (a,b,c); 'all' for all "
        "(default: the most dilated layer of each model, and cases that no model covers)",
    )
    parser.addoption(
        "--implementation",
        help="of ours, with commas (default: the one that is picked, and every other that runs)",
    )


def pytest_configure(config):
    # The settings in pyproject.toml switch timing off, for the tests' sake. To come here by name
    # is to ask for it.
    if not config.getoption("--collect-only"):
        config.option.benchmark_disable = False
