"""What wins over what among a context, a call, a variable and the default; and who sees it."""

import asyncio
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import fastconv
from fastconv.settings import Settings


@pytest.mark.parametrize(
    ("value", "strict"),
    [
        *(("1", True), ("true", True), ("YES", True), (" on ", True)),
        *(("0", False), ("False", False), ("no", False), ("off", False), ("", False), (None, False)),
    ],
)
def test_variable(value: str | None, strict: bool) -> None:
    assert Settings({} if value is None else {"FASTCONV_STRICT": value}).strict is strict


def test_a_variable_without_meaning_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match=r"^FASTCONV_STRICT must be one of 1, true, .*, but is 'maybe'$"):
        Settings({"FASTCONV_STRICT": "maybe"})


def test_the_processs_variable_is_read() -> None:
    command = "import fastconv; print(fastconv.settings)"
    environment = {**os.environ, "FASTCONV_STRICT": "yes"}
    out = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert out == "fastconv.settings(strict=True, prefer='fastest', tune='cached', numerics='fast')\n"


def test_context_over_call_over_variable() -> None:
    settings = Settings({"FASTCONV_STRICT": "1"})
    assert settings.strict is True
    settings(strict=False)
    assert settings.strict is False
    with settings(strict=True):
        assert settings.strict is True
        settings(strict=False)
        assert settings.strict is True
        with settings(strict=False):
            assert settings.strict is False
        assert settings.strict is True
    assert settings.strict is False


def test_words() -> None:
    settings = Settings({"FASTCONV_TUNE": "Off", "FASTCONV_NUMERICS": "stable"})
    assert settings.values == (False, "fastest", "off", "stable")
    with settings(prefer="triton"):
        settings(tune="first")
        assert settings.values == (False, "triton", "first", "stable")
    assert (settings.prefer, settings.tune, settings.numerics) == ("fastest", "first", "stable")
    with pytest.raises(ValueError, match=r"^FASTCONV_PREFER must be one of fastest, triton, but is 'cudnn'$"):
        Settings({"FASTCONV_PREFER": "cudnn"})


def test_backward_goes_by_the_contexts_of_other_threads() -> None:
    settings = Settings({})
    with ThreadPoolExecutor(1) as other:
        with settings(strict=True, tune="off"), settings(strict=False, numerics="stable"):
            assert other.submit(lambda: settings.values_in_backward).result() == (True, "fastest", "off", "stable")
            assert settings.values_in_backward == settings.values == (False, "fastest", "off", "stable")
        assert other.submit(lambda: settings.values_in_backward).result() == settings.values


def test_a_context_leaves_what_it_found() -> None:
    settings = Settings({})
    with pytest.raises(KeyError), settings(strict=True):
        raise KeyError
    assert settings.strict is False
    settings(strict=True)
    for _ in range(3):
        with settings(strict=False):
            assert settings.strict is False
        assert settings.strict is True


def test_one_object_entered_twice() -> None:
    settings = Settings({})
    strict = settings(strict=True)
    with strict, settings(strict=False), strict:
        assert settings.strict is True
    assert settings.strict is False
    with strict:
        assert settings.strict is True
    assert settings.strict is False


def test_nothing_given_changes_nothing() -> None:
    settings = Settings({})
    settings()
    with settings(strict=True), settings():
        assert settings.strict is True
    assert settings.strict is False


def test_another_name_or_type_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="tuning"):
        fastconv.settings(tuning="first")  # type: ignore[call-arg]
    with pytest.raises(
        ValueError, match=r"^settings: tune must be one of cached, off, first, force, but got 'always'$"
    ):
        fastconv.settings(tune="always")
    with pytest.raises(TypeError, match="strict must be True or False, but got 'yes'"):
        fastconv.settings(strict="yes")  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        fastconv.settings.strict = True  # type: ignore[misc]


def test_a_call_is_seen_by_other_threads_and_a_context_is_not() -> None:
    settings = Settings({})
    with ThreadPoolExecutor(1) as other:
        with settings(strict=True):
            assert other.submit(lambda: settings.strict).result() is False
        settings(strict=True)
        assert other.submit(lambda: settings.strict).result() is True


def test_contexts_of_threads_that_overlap() -> None:
    settings, barrier = Settings({}), threading.Barrier(4)

    def enter(strict: bool) -> list[bool]:
        seen = []
        for _ in range(200):
            change = settings(strict=strict)
            barrier.wait()
            with change:
                seen.append(settings.strict)
                barrier.wait()
        return seen

    with ThreadPoolExecutor(4) as threads:
        seen = list(threads.map(enter, [True, False, True, False]))
    assert seen == [[True] * 200, [False] * 200, [True] * 200, [False] * 200]
    assert settings.strict is False


def test_contexts_of_asyncio_tasks() -> None:
    settings = Settings({})

    async def enter(strict: bool) -> bool:
        with settings(strict=strict):
            await asyncio.sleep(0)
            return settings.strict

    async def main() -> list[bool]:
        return await asyncio.gather(*(enter(i % 2 == 0) for i in range(6)))

    assert asyncio.run(main()) == [True, False] * 3
