"""Options of `pytest bench`, and what its JSON says of the machine."""

from bench.files import environment
from bench.models import HERE


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="fewer rounds, at most 50 steps")
    parser.addoption("--data", help="an .npz, whose size and words the models get [digits]")
    parser.addoption("--width", type=int, help="of all models [their scripts']")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(environment(HERE))
