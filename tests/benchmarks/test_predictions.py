"""What is committed as the cost model's predictions is what it predicts."""

from fastconv.benchmarks.write_predictions import OPEN, written


def test_committed_predictions_are_the_cost_models() -> None:
    text = OPEN.read_text()
    fresh = written(text)
    changed = [line for line in fresh.splitlines() if line not in text.splitlines()]
    assert fresh == text, "\n".join(("python -m fastconv.benchmarks.write_predictions writes instead:", *changed))
