"""What the JSON of `pytest bench` says of the machine."""

from bench.files import environment
from bench.models import HERE


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(environment(HERE))
