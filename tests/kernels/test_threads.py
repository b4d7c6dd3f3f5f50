"""Every op may run in several threads at once: each thread gets the bits that it gets alone."""

import threading

import op_cases
import pytest
import torch

THREADS, RUNS = 4, 15


@pytest.mark.parametrize("name", op_cases.NAMES)
def test_results_are_those_of_one_thread(name, one_thread):
    cases = []
    for size in range(
        THREADS
    ):  # different sizes, so that a shared buffer would be resized under another thread
        case = op_cases.build(name, leading=(33 + 40 * size,))
        case.run()  # builds and loads what is built once
        cases.append((case, case.run()))
    start, wrong = threading.Barrier(THREADS), []

    def work(case, expected):
        start.wait()
        try:
            for _ in range(RUNS):
                actual = case.run()
                wrong.extend(key for key in expected if not torch.equal(actual[key], expected[key]))
        except Exception as error:  # the thread would only print it
            wrong.append(error)

    workers = [threading.Thread(target=work, args=pair) for pair in cases]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
