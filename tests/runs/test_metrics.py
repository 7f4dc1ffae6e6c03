import asyncio

from prometheus_client.parser import text_string_to_metric_families

from responses_ingress.core.deltas import Accepted, Finish
from responses_ingress.errors import UpstreamError
from responses_ingress.runs.metrics import Metrics
from responses_ingress.testing import spoken
from tests.runs.stage import Stage, loop_turns

PREFIX = "responses_ingress_"


def scraped(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Every sample: its name without our prefix, its labels' values in the order of their names."""
    families = text_string_to_metric_families(metrics.expose().decode())
    return {
        (sample.name.removeprefix(PREFIX), *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in families
        for sample in family.samples
    }


def test_an_ended_response_is_counted_by_backend_and_status_with_its_time() -> None:
    metrics = Metrics()
    for status, seconds in (("completed", 0.2), ("completed", 3.0), ("failed", 0.01)):
        metrics.count("vllm", status, seconds)
    metrics.count("echo", "completed", 0.0)
    samples = scraped(metrics)
    assert samples["responses_total", "vllm", "completed"] == 2
    assert samples["responses_total", "vllm", "failed"] == 1
    assert samples["responses_total", "echo", "completed"] == 1
    assert samples["response_seconds_count", "vllm"] == 3
    assert samples["response_seconds_sum", "vllm"] == 3.21
    assert samples["response_seconds_bucket", "vllm", "0.25"] == 2


def test_two_applications_in_one_process_share_no_counts() -> None:
    first, second = Metrics(), Metrics()
    first.count("vllm", "completed", 1.0)
    assert ("responses_total", "vllm", "completed") not in scraped(second)


async def test_what_runs_now_is_a_gauge(stage: Stage) -> None:
    assert scraped(stage.metrics)["running",] == 0
    hold = asyncio.Event()
    runs = [await stage.play(hold, *spoken("hi")) for _ in range(2)]
    assert scraped(stage.metrics)["running",] == 2
    hold.set()
    await asyncio.gather(*(run.ended for run in runs))
    await loop_turns()
    assert scraped(stage.metrics)["running",] == 0


async def test_runs_are_counted_when_they_end_and_timed_by_the_clock(stage: Stage) -> None:
    hold = asyncio.Event()
    slow = await stage.play(hold, *spoken("hi"))
    await stage.backend.called(1)
    stage.clock.advance(42)
    hold.set()
    failed = await stage.play([Accepted()], UpstreamError("No."))
    await asyncio.gather(slow.ended, failed.ended)
    await loop_turns()
    samples = scraped(stage.metrics)
    assert samples["responses_total", "scripted", "completed"] == 1
    assert samples["responses_total", "scripted", "failed"] == 1
    assert samples["response_seconds_sum", "scripted"] == 42


async def test_an_answer_without_usage_is_counted(stage: Stage) -> None:
    given, missing = await stage.play(*spoken("hi")), await stage.play([Finish("completed")])
    await asyncio.gather(given.ended, missing.ended)
    await loop_turns()
    assert scraped(stage.metrics)["usage_missing_total", "scripted"] == 1
