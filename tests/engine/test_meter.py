"""What the engine reports: the streams of now, and each step once."""

from expertd.engine.messages import Reading, Stats, Steps
from expertd.engine.meter import Meter
from tests.engine.scripted import Bench


def test_report_of_streams() -> None:
    bench = Bench(max_streams=2, prefill_chunk=4)
    bench.runner.report = lambda: Stats(kv_bytes=7)  # type: ignore[attr-defined]
    for name in "abc":
        bench.ask(name, f"the prompt {name}", name * 12)
    bench.engine.step()
    stats = bench.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_tokens, stats.kv_bytes) == (2, 1, 4, 7)
    assert stats.reading == [Reading("a", 4, 12), Reading("b", 0, 12)]
    bench.finish()
    assert bench.engine.stats() == Stats(kv_bytes=7)


def test_meter_gives_every_step_once() -> None:
    bench, meter = Bench(prefill_chunk=4), Meter()
    bench.runner.before_step = lambda plan: meter.took(plan, 0.5)
    bench.ask("r", "ten tokens", "ok")
    bench.finish()
    assert meter.take() == [Steps("solo", False, 3, 9, 1.5), Steps("solo", True, 3, 3, 1.5)]
    assert meter.take() == []
