"""Teacher samples come back as they were written, or the store says what to do."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from distill import store as module
from distill.store import (
    Dtype,
    StoreCorrupt,
    StoredGroup,
    StoredReference,
    StoreIncomplete,
    StoreMismatch,
    TeacherStore,
    initial_noise,
)
from rollout.draws import Group

SHAPE = (2, 1, 4, 4)
IDENTITY = {"checkpoint": "digits", "sampler": {"steps": 20, "shift": 3.0}, "seed": 0}


def group(number: int, size: int = 3) -> StoredGroup:
    draws = Group(0, number, f"p{number}", "", {}, size, seed=number)
    seeds = np.array([draws.draw(j).seed for j in range(size)], np.int64)
    x0 = np.random.default_rng(number).standard_normal((size, *SHAPE), np.float32)
    return StoredGroup(f"p{number}", f"prompt {number}", {"digit": number}, seeds, x0)


def filled(directory: Path, shards: int = 3, dtype: Dtype = "float32") -> TeacherStore:
    """Two groups a shard."""
    made = TeacherStore.create(directory, IDENTITY, shards, dtype)
    for shard in made.missing():
        made.write(shard, [group(2 * shard), group(2 * shard + 1)])
    return made


def assert_equal(found: StoredGroup, expected: StoredGroup) -> None:
    assert (found.prompt_id, found.prompt) == (expected.prompt_id, expected.prompt)
    assert found.columns == expected.columns
    assert (found.seeds.dtype, found.x0.dtype) == (np.int64, np.float32)
    assert found.seeds.tolist() == expected.seeds.tolist()
    assert found.x0.shape == expected.x0.shape
    assert found.x0.tobytes() == expected.x0.tobytes()


def write(directory: Path, shards: list[int]) -> None:
    """Write some of 8 shards, as one of several processes would."""
    opened = TeacherStore.create(directory, IDENTITY, 8)
    for shard in shards:
        opened.write(shard, [group(2 * shard), group(2 * shard + 1)])


def test_groups_come_back_bit_for_bit_in_order(tmp_path: Path):
    filled(tmp_path)
    opened = TeacherStore.open(tmp_path)
    assert len(opened) == 6
    assert (opened.identity, opened.shards, opened.dtype) == (IDENTITY, 3, "float32")
    for position in range(6):
        assert_equal(opened.reference(position).read(), group(position))
    for position in (-1, 6):
        with pytest.raises(IndexError, match=f"group {position} of 6"):
            opened.reference(position)


def test_a_group_that_was_read_does_not_keep_its_shard_mapped(tmp_path: Path):
    made = filled(tmp_path)
    held = made.reference(0).read()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert_equal(held, group(0))


def test_special_numbers_and_unicode_survive(tmp_path: Path):
    x0 = np.zeros((1, *SHAPE), np.float32)
    x0.flat[:5] = [np.nan, -0.0, np.inf, 1e-45, np.float32(1) + np.float32(2**-23)]
    odd = StoredGroup(
        "日本-é\u2028", "a 🐈‍⬛ says\n\"ünï\"\x00 \ud800", {"ответ": ["∑", None, 1.5, True]},
        np.array([2**63 - 1], np.int64), x0,
    )  # fmt: skip
    made = TeacherStore.create(tmp_path / "тест 🐈", {"prompts": "ä"}, 1)
    made.write(0, [odd])
    assert_equal(TeacherStore.open(tmp_path / "тест 🐈").reference(0).read(), odd)


def test_bfloat16_rounds_once_and_halves_the_size(tmp_path: Path):
    big = group(0, size=500)
    for dtype in ("float32", "bfloat16"):
        TeacherStore.create(tmp_path / dtype, IDENTITY, 1, dtype).write(0, [big])
    found = TeacherStore.open(tmp_path / "bfloat16").reference(0).read()
    expected = torch.from_numpy(big.x0).bfloat16().float().numpy()
    assert found.x0.dtype == np.float32
    assert found.x0.tobytes() == expected.tobytes() != big.x0.tobytes()
    files = [tmp_path / dtype / "shard_000000.safetensors" for dtype in ("float32", "bfloat16")]
    assert files[0].stat().st_size - files[1].stat().st_size == big.x0.nbytes // 2


def test_groups_may_differ_in_size_and_be_empty(tmp_path: Path):
    made = TeacherStore.create(tmp_path, IDENTITY, 4)
    shards = [[group(0, 0)], [group(1, 2), group(2, 0), group(3, 1)], [], [group(4, 0), group(5)]]
    for shard, groups in enumerate(shards):
        made.write(shard, groups)
    assert made.missing() == []
    opened = TeacherStore.open(tmp_path)
    expected = [one for groups in shards for one in groups]
    assert len(opened) == len(expected)
    for position, one in enumerate(expected):
        assert_equal(opened.reference(position).read(), one)
    assert [opened.reference(position).rows for position in range(6)] == [0, 2, 0, 1, 0, 3]
    assert opened.reference(5) == StoredReference(tmp_path, shard=3, group=1, rows=3)


def test_initial_noise_is_the_draw_s_own():
    draws = Group(3, 1, "p", "", {}, 4, seed=99)
    seeds = np.array([draws.draw(j).seed for j in range(4)], np.int64)
    noise = initial_noise(seeds, SHAPE)
    assert (noise.shape, noise.dtype) == ((4, *SHAPE), torch.float32)
    for j in range(4):
        assert torch.equal(noise[j], draws.draw(j).noise("initial", SHAPE))
    assert initial_noise(seeds[:0], SHAPE).shape == (0, *SHAPE)


def test_only_the_rows_of_the_group_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = TeacherStore.create(tmp_path, IDENTITY, 1)
    made.write(0, [group(0, 5), group(1, 2), group(2, 4)])
    asked: list[tuple[str, slice]] = []

    class Rows:
        def __init__(self, tensors: Any, name: str) -> None:
            self.name, self.rows = name, tensors.get_slice(name)

        def __getitem__(self, rows: slice) -> torch.Tensor:
            asked.append((self.name, rows))
            return self.rows[rows]

    @contextmanager
    def watched(file: Path, framework: str) -> Generator[SimpleNamespace]:
        """The real file; it notes the rows that are asked for, and can give no whole tensor."""
        with safe_open(file, framework=framework) as tensors:
            yield SimpleNamespace(metadata=tensors.metadata, get_slice=partial(Rows, tensors))

    monkeypatch.setattr(module, "safe_open", watched)
    assert_equal(made.reference(1).read(), group(1, 2))
    assert asked == [("seeds", slice(5, 7)), ("x0", slice(5, 7))]


def test_a_shard_is_hashed_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    filled(tmp_path)
    hashed: list[str] = []
    digest: Callable[[Path], str] = module._digest  # pyright: ignore[reportPrivateUsage]

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return digest(path)

    monkeypatch.setattr(module, "_digest", counting)
    opened = TeacherStore.open(tmp_path)
    assert hashed == []
    for position in (0, 1, 0, 5, 4):
        opened.reference(position).read()
    assert hashed == ["shard_000000.safetensors", "shard_000002.safetensors"]


@pytest.mark.parametrize("calls", range(6))
def test_a_writer_killed_at_any_moment_loses_only_its_shard(tmp_path: Path, calls: int):
    made = TeacherStore.create(tmp_path, IDENTITY, 3)
    made.write(0, [group(0), group(1)])

    def write_and_die() -> None:
        # A write makes 6 system calls that matter: fsync, rename, fsync for shard and small file.
        left = [calls]
        for name in ("fsync", "replace"):
            real = getattr(os, name)

            def dying(*args: Any, real: Any = real) -> None:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                real(*args)

            setattr(os, name, dying)
        made.write(1, [group(2), group(3)])

    process = multiprocessing.get_context("fork").Process(target=write_and_die)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".tmp-*"))) == 1
    resumed = TeacherStore.create(tmp_path, IDENTITY, 3)
    # Only after the second rename is the shard in the index.
    assert resumed.missing() == ([2] if calls == 5 else [1, 2])
    with pytest.raises(StoreIncomplete, match=r"of 3 shards.*`rectify teacher RECIPE`"):
        TeacherStore.open(tmp_path)
    filled(tmp_path)
    assert len(list(tmp_path.glob(".tmp-*"))) == (calls == 5)
    opened = TeacherStore.open(tmp_path)
    for position in range(6):
        assert_equal(opened.reference(position).read(), group(position))


def test_a_failed_write_leaves_no_temporary_file(tmp_path: Path):
    made = TeacherStore.create(tmp_path, IDENTITY, 1)
    (tmp_path / "shard_000000.json").mkdir()  # the small file cannot be put there
    with pytest.raises(OSError):
        made.write(0, [group(0)])
    assert list(tmp_path.glob(".tmp-*")) == []


def test_a_writer_leaves_what_others_are_writing(tmp_path: Path):
    made = TeacherStore.create(tmp_path, IDENTITY, 30)
    others = [tmp_path / f".tmp-shard_{n:06d}.safetensors-x" for n in (0, 2, 10, 20)]
    for other in others:
        other.mkdir()
    made.write(1, [group(2)])
    assert sorted(tmp_path.glob(".tmp-*")) == others


def test_a_shard_that_is_replaced_counts_anew(tmp_path: Path):
    made = filled(tmp_path)
    assert len(made) == 6
    made.write(0, [group(0)])
    assert len(made) == 5
    assert_equal(made.reference(1).read(), group(2))


def test_writing_again_gives_the_same_bytes(tmp_path: Path):
    filled(tmp_path)
    paths = sorted(tmp_path.iterdir())
    before = [path.read_bytes() for path in paths]
    TeacherStore.create(tmp_path, IDENTITY, 3).write(1, [group(2), group(3)])
    assert sorted(tmp_path.iterdir()) == paths
    assert [path.read_bytes() for path in paths] == before


def test_a_changed_shard_is_named_and_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    filled(tmp_path)
    content = bytearray((tmp_path / "shard_000001.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "shard_000001.safetensors").write_bytes(content)
    opened = TeacherStore.open(tmp_path)
    assert_equal(opened.reference(0).read(), group(0))
    for _ in range(2):  # a failure is not remembered as a success
        with pytest.raises(StoreCorrupt, match=r"shard 1 is damaged.*sha256.*`rectify teacher"):
            opened.reference(2).read()
    with caplog.at_level(logging.WARNING):
        assert TeacherStore.create(tmp_path, IDENTITY, 3).missing() == [1]
    assert "shard 1 is damaged" in caplog.text
    filled(tmp_path)
    assert_equal(TeacherStore.open(tmp_path).reference(2).read(), group(2))


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_a_file_that_is_short_or_gone_is_seen_on_opening(tmp_path: Path, suffix: str):
    filled(tmp_path)
    victim = tmp_path / f"shard_000002.{suffix}"
    os.truncate(victim, victim.stat().st_size - 1)
    with pytest.raises(StoreCorrupt, match=r"shard 2 is damaged.*`rectify teacher RECIPE`"):
        TeacherStore.open(tmp_path)
    victim.unlink()
    with pytest.raises(StoreIncomplete, match=r"1 of 3 shards.*the first is 2.*`rectify teacher"):
        TeacherStore.open(tmp_path)
    assert TeacherStore.create(tmp_path, IDENTITY, 3).missing() == [2]
    assert filled(tmp_path).missing() == []
    assert_equal(TeacherStore.open(tmp_path).reference(5).read(), group(5))


def test_no_store_says_which_command_makes_one(tmp_path: Path):
    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(StoreIncomplete, match="no teacher samples: `rectify teacher RECIPE`"):
            TeacherStore.open(directory)
    with pytest.raises(StoreIncomplete, match="2 of 2 shards"):
        len(TeacherStore.create(tmp_path, IDENTITY, 2))


@pytest.mark.parametrize(
    ("identity", "shards", "dtype", "named"),
    [
        ({"sampler": {"steps": 30, "shift": 3.0}}, 3, "float32", "sampler.steps (there 20, asked for 30)"),
        ({"seed": "0"}, 3, "float32", 'seed (there 0, asked for "0")'),
        ({"guidance": 4}, 3, "float32", "guidance (there nothing, asked for 4)"),
        ({}, 4, "float32", "shards (there 3, asked for 4)"),
        ({}, 3, "bfloat16", 'dtype (there "float32", asked for "bfloat16")'),
    ],
)  # fmt: skip
def test_another_identity_is_refused_by_name(
    tmp_path: Path, identity: dict[str, Any], shards: int, dtype: Dtype, named: str
):
    filled(tmp_path)
    with pytest.raises(StoreMismatch) as refused:
        TeacherStore.create(tmp_path, IDENTITY | identity, shards, dtype)
    assert named in str(refused.value)
    assert str(refused.value).count("(there") == 1
    assert len(TeacherStore.open(tmp_path)) == 6


def test_tuples_and_the_order_of_facts_make_no_other_identity(tmp_path: Path):
    first = TeacherStore.create(tmp_path, {"a": (1, 2), "b": {"c": 1, "d": 2}}, 1)
    again = TeacherStore.create(tmp_path, {"b": {"d": 2, "c": 1}, "a": [1, 2]}, 1)
    assert first.identity == again.identity


def test_a_shard_of_another_store_does_not_count(tmp_path: Path):
    filled(tmp_path / "a")
    TeacherStore.create(tmp_path / "b", IDENTITY | {"seed": 1}, 3)
    for path in (tmp_path / "a").glob("shard_*"):
        (tmp_path / "b" / path.name).write_bytes(path.read_bytes())
    assert TeacherStore.create(tmp_path / "b", IDENTITY | {"seed": 1}, 3).missing() == [0, 1, 2]


def test_a_store_of_a_later_format_is_not_overwritten(tmp_path: Path):
    filled(tmp_path)
    header = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps(header | {"format": 2}))
    for act in (lambda: TeacherStore.open(tmp_path), lambda: filled(tmp_path)):
        with pytest.raises(StoreCorrupt, match=r"store\.json: remove it and run `rectify teacher"):
            act()
    assert json.loads((tmp_path / "store.json").read_text())["format"] == 2


def test_a_torch_that_draws_other_noise_is_refused(tmp_path: Path):
    made = TeacherStore.create(tmp_path, IDENTITY, 3)
    for shard, groups in enumerate([[group(0, 0)], [group(1)], [group(2)]]):
        made.write(shard, groups)
    facts = json.loads((tmp_path / "shard_000001.json").read_text())
    noise = initial_noise(group(1).seeds, SHAPE)[0].numpy()
    assert facts["noise"] == hashlib.sha256(noise.tobytes()).hexdigest()
    references = [made.reference(position) for position in range(3)]

    def forge(shard: int) -> None:
        index = tmp_path / f"shard_{shard:06d}.json"
        facts = json.loads(index.read_text())
        index.write_text(json.dumps(facts | {"noise": "0" * 64, "torch": "1.13.1"}))

    forge(2)
    opened = TeacherStore.open(tmp_path)  # its first sample is in shard 1
    opened.reference(1).read()
    with pytest.raises(StoreMismatch, match=r"torch 1\.13\.1 did"):
        references[2].read()
    forge(1)
    for act in (TeacherStore.open, lambda path: TeacherStore.create(path, IDENTITY, 3)):
        with pytest.raises(StoreMismatch, match=r"does not draw the noise.*torch 1\.13\.1 did"):
            act(tmp_path)


def test_two_processes_write_and_others_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        halves = [list(range(0, 8, 2)), list(range(1, 8, 2))]
        pool.starmap(write, [(tmp_path, half) for half in halves], chunksize=1)
        opened = TeacherStore.open(Path())  # relative here, found from anywhere
        references = [opened.reference(position) for position in range(16)]
        monkeypatch.chdir("/")
        found = pool.map(StoredReference.read, references)
    assert opened.missing() == []
    for position, one in enumerate(found):
        assert_equal(one, group(position))


def test_shards_are_readable_by_whoever_may_read_the_store(tmp_path: Path):
    filled(tmp_path)
    (tmp_path / "plain").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x0": np.zeros((3, *SHAPE))}, "float64"),
        ({"x0": np.zeros((2, 9, 1, 4, 4), np.float32)}, r"\(2, 9, 1, 4, 4\)"),
        ({"seeds": np.zeros(3, np.int32)}, "int32"),
        ({"columns": {"pair": (1, 2)}}, "not plain JSON"),
        ({"columns": {3: "x"}}, "not plain JSON"),
    ],
)
def test_a_group_that_would_come_back_different_is_refused(
    tmp_path: Path, wrong: dict[str, Any], message: str
):
    made = TeacherStore.create(tmp_path, IDENTITY, 1)
    with pytest.raises(ValueError, match=f"'p1'.*{message}"):
        made.write(0, [group(0), StoredGroup(**{**vars(group(1)), **wrong})])
    with pytest.raises(ValueError, match="shard 1 of 1"):
        made.write(1, [])
    assert made.missing() == [0]
