"""Prompt sets: the embedded digits, files and datasets whose mistakes are placed; TRL's rewards."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from rewards.calling import Scores, call_reward
from rewards.plugins import FunctionReward
from rollout.draws import Prompt
from rollout.policies.wan_conditional import WanPolicy
from rollout.prompts import DIRECTIONS, DatasetPrompts, DigitPrompts, FilePrompts, PromptsConfig

# Rows as the published prompts of GenEval have them.
GENEVAL: list[dict[str, Any]] = [
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "position",
        "include": [
            {"class": "cow", "count": 1},
            {"class": "dog", "count": 1, "position": ["left of", 0]},
        ],
        "prompt": "a photo of a dog left of a cow",
    },
]
TRL_CONVERSATIONS: list[dict[str, Any]] = [
    {"prompt": [{"role": "user", "content": "What is 2+2?"}], "solution": "4", "level": 1},
    {"prompt": [{"role": "user", "content": "What is 3+4?"}], "solution": "7", "level": 2},
]


def write(directory: Path, text: str, name: str = "prompts.jsonl") -> FilePrompts:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return FilePrompts(path=path)


def test_the_embedded_policy_understands_every_digit_prompt(base_policy: WanPolicy):
    prompts = DigitPrompts().load()
    conditions = base_policy.encode([prompt.text for prompt in prompts])
    assert conditions[:, 0].argmax(1).tolist() == [prompt.columns["digit"] for prompt in prompts]
    assert conditions.sum() == 10


def test_moving_prompts_are_all_pairs_with_ids_of_their_own():
    prompts = DigitPrompts(moving=True).load()
    pairs = {(prompt.columns["digit"], prompt.columns["direction"]) for prompt in prompts}
    assert pairs == {(digit, way) for digit in range(10) for way in DIRECTIONS}
    assert len({prompt.id for prompt in prompts}) == 40
    assert all(
        prompt.text == f"a handwritten {prompt.columns['digit']} moving "
        f"{prompt.columns['direction']}"
        for prompt in prompts
    )


def test_text_files_hold_a_prompt_a_line(tmp_path: Path):
    prompts = write(tmp_path, "a red fox\n\n  ünïcode 狐 \r\n", "p.txt").load()
    assert prompts == [Prompt("1", "a red fox", {}), Prompt("3", "ünïcode 狐", {})]


def test_jsonl_files_hold_ids_and_columns(tmp_path: Path):
    rows = [
        {"prompt": "a 3", "id": "three", "digit": 3},
        {"prompt": "a 4", "digit": 4, "tags": ["x"]},
        {"prompt": "a 5", "id": 17},
    ]
    prompts = write(tmp_path, "\n".join(map(json.dumps, rows)) + "\n\n").load()
    assert prompts == [
        Prompt("three", "a 3", {"digit": 3}),
        Prompt("2", "a 4", {"digit": 4, "tags": ["x"]}),
        Prompt("17", "a 5", {}),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a"}\n{"prompt" "b"}\n', r"prompts\.jsonl:2: not JSON: .* at column 11:"),
        ('\n["a"]\n', r"prompts\.jsonl:2: is no object"),
        ('{"text": "a"}\n', r"prompts\.jsonl:1: key 'prompt' is missing .*\(keys here: text\)"),
        ('{"prompt": 3}\n', r"prompts\.jsonl:1: key 'prompt' .*no valid text"),
        ('{"prompt": "\\ud800"}\n', r"prompts\.jsonl:1: key 'prompt' .*no valid text"),
        (
            '{"prompt": []}\n',
            r"prompts\.jsonl:1: .* conversation of the turns none: a policy takes",
        ),
        ('{"prompt": [{"role": "user"}]}\n', r"prompts\.jsonl:1: key 'prompt' .*no valid text"),
        ('{"prompt": "a", "completions": 1}\n', r"prompts\.jsonl:1: .*'completions': give the key"),
        ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n', "prompts 1 and 2 share .*'x'"),
        ('{"prompt": "a", "id": "2"}\n{"prompt": "b"}\n', "prompts 1 and 2 share the id '2'"),
        (" \n\n", "holds no prompt"),
        ("", "holds no prompt"),
    ],
)
def test_mistakes_in_a_file_are_placed(tmp_path: Path, text: str, words: str):
    with pytest.raises(ValueError, match=words):
        write(tmp_path, text).load()


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"absent\.txt: cannot be read"):
        FilePrompts(path=tmp_path / "absent.txt").load()
    with pytest.raises(ValueError, match=r"from \.txt, \.jsonl, .* is kind: dataset"):
        FilePrompts(path=tmp_path / "prompts.csv").load()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"latin\.txt: cannot be read"):
        FilePrompts(path=tmp_path / "latin.txt").load()
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match=r"folder\.txt: cannot be read: is a directory"):
        FilePrompts(path=tmp_path / "folder.txt").load()


def test_a_json_string_may_hold_any_separator_but_a_line_feed(tmp_path: Path):
    prompts = write(tmp_path, '{"prompt": "one\u2028line"}\n{"prompt": "two\u0085too"}\n').load()
    assert [prompt.text for prompt in prompts] == ["one\u2028line", "two\u0085too"]


def test_the_kind_chooses_the_prompts():
    adapter: TypeAdapter[DigitPrompts | FilePrompts] = TypeAdapter(PromptsConfig)
    assert adapter.validate_python({"kind": "digits", "moving": True}) == DigitPrompts(moving=True)
    chosen = adapter.validate_python({"kind": "file", "path": "a.txt"})
    assert chosen == FilePrompts(path=Path("a.txt"))
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "digits", "path": "a.txt"})
    rows = {"kind": "dataset", "source": "trl-lib/math_shepherd", "prompt_column": "question"}
    assert isinstance(adapter.validate_python(rows), DatasetPrompts)


def save(path: Path, rows: list[dict[str, Any]], **options: Any) -> str:
    """Rows in the layout that the name says: .parquet, or a directory of save_to_disk."""
    from datasets import Dataset

    dataset = Dataset.from_list(rows, **options)
    if path.suffix == ".parquet":
        dataset.to_parquet(path)
    else:
        dataset.save_to_disk(path)
    return str(path)


def test_a_parquet_file_is_the_same_set_as_its_lines(tmp_path: Path):
    rows = [{"prompt": "a 3", "id": "three", "digit": 3}, {"prompt": "a 4", "id": None, "digit": 4}]
    lines = write(tmp_path, "\n".join(map(json.dumps, rows))).load()
    save(tmp_path / "prompts.parquet", rows)
    assert FilePrompts(path=tmp_path / "prompts.parquet").load() == lines
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    assert FilePrompts(path=tmp_path / "prompts.json").load() == lines
    assert [prompt.id for prompt in lines] == ["three", "2"]


def test_nested_columns_reach_rewards_as_they_were_published(tmp_path: Path):
    prompts = write(tmp_path, "\n".join(map(json.dumps, GENEVAL))).load()
    wanted = [{k: v for k, v in row.items() if k != "prompt"} for row in GENEVAL]
    assert [prompt.columns for prompt in prompts] == wanted
    mixed = save(tmp_path / "mixed", GENEVAL, on_mixed_types="use_json")
    saved = DatasetPrompts(source=mixed).load()
    assert [prompt.columns for prompt in saved] == [wanted[0], {**wanted[1], "exclude": None}]


def test_conversations_of_one_user_turn_are_its_text(tmp_path: Path):
    wanted = [
        Prompt("1", "What is 2+2?", {"solution": "4", "level": 1}),
        Prompt("2", "What is 3+4?", {"solution": "7", "level": 2}),
    ]
    for name in ("set.parquet", "set"):
        source = save(tmp_path / name, TRL_CONVERSATIONS)
        assert DatasetPrompts(source=source).load() == wanted
    assert DatasetPrompts(source=source, limit=1).load() == wanted[:1]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, TRL_CONVERSATIONS)))
    assert FilePrompts(path=path).load() == wanted


@pytest.mark.parametrize("roles", [("system", "user"), ("user", "assistant", "user"), ("system",)])
def test_other_conversations_are_refused_with_their_turns(tmp_path: Path, roles: tuple[str, ...]):
    turns = [{"role": role, "content": "x"} for role in roles]
    rows = [TRL_CONVERSATIONS[0], {"prompt": turns, "solution": "", "level": 0}]
    words = rf"set, row 2: key 'prompt' is a .* turns {', '.join(roles)}: a policy takes one user"
    with pytest.raises(ValueError, match=words):
        DatasetPrompts(source=save(tmp_path / "set", rows)).load()


def test_the_prompt_may_stand_in_any_column(tmp_path: Path):
    rows = [{"question": "q", "prompt": "p", "id": 7}]
    source = save(tmp_path / "set", rows)
    assert DatasetPrompts(source=source, prompt_column="question").load() == [
        Prompt("7", "q", {"prompt": "p"})
    ]
    assert DatasetPrompts(source=source).load() == [Prompt("7", "p", {"question": "q"})]
    with pytest.raises(ValueError, match=r"'text' is missing .*keys here: question, prompt, id"):
        DatasetPrompts(source=source, prompt_column="text").load()


def test_ids_count_through_the_files_of_a_directory(tmp_path: Path):
    for part in (0, 1):
        rows = [{"prompt": f"{part}{n}"} for n in range(2)]
        save(tmp_path / f"train-{part}-of-2.parquet", rows)
    loaded = DatasetPrompts(source=str(tmp_path)).load()
    assert [(p.id, p.text) for p in loaded] == [("1", "00"), ("2", "01"), ("3", "10"), ("4", "11")]


def test_a_missing_package_is_named_before_a_dataset_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    parquet = Path(save(tmp_path / "set.parquet", TRL_CONVERSATIONS))
    hub = DatasetPrompts(source="trl-lib/DeepMath-103K")
    assert hub.on_hub
    hub.check_hub_reader()
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for read in (hub.check_hub_reader, hub.load, FilePrompts(path=parquet).load):
        with pytest.raises(ValueError, match=r"needs the package 'datasets': pip install"):
            read()


# Functions as TRL's documentation writes them; they are named by path below.
def follows_trl(
    prompts: list[str],
    completions: list[str],
    solution: list[str],
    level: list[int],
    completion_ids: list[list[int]] | None = None,
    trainer_state: Any = None,
    log_extra: Callable[[str, list[Any]], None] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    rows = zip(prompts, completions, solution, level, strict=True)
    found = [
        float(said == gold) * lv if prompt.startswith("What is") else None
        for prompt, said, gold, lv in rows
    ]
    if log_extra is not None:
        log_extra("solution", solution)
    if log_metric is not None:
        log_metric("accuracy", 0.0)
    return found


def wants_the_trainer(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
    return [float(trainer_state.global_step)] * len(completions)


def reward(path: str, prompts: list[Prompt], said: list[str], **options: Any) -> Scores:
    """What a run does: the columns of the prompts' groups, and the reward that a recipe names."""
    function = FunctionReward(path=path, **options).build()
    columns = {name: [p.columns[name] for p in prompts] for name in prompts[0].columns}
    return call_reward("r", function, [p.text for p in prompts], said, columns, 8)


def test_a_function_of_trls_signature_scores_a_trl_dataset_unchanged(tmp_path: Path):
    prompts = DatasetPrompts(source=save(tmp_path / "set", TRL_CONVERSATIONS)).load()
    scores = reward("tests.rollout.test_prompts:follows_trl", prompts, ["4", "7"])
    assert scores.failures == () and scores.values.tolist() == [1.0, 2.0]
    wrong = reward("tests.rollout.test_prompts:follows_trl", prompts, ["4", "8"])
    assert wrong.values.tolist() == [1.0, 0.0]


def test_trls_own_rewards_score_text_as_conversations(tmp_path: Path):
    prompts = DatasetPrompts(source=save(tmp_path / "set", TRL_CONVERSATIONS)).load()
    said = [r"$\boxed{4}$", r"$\boxed{8}$"]
    right = reward("trl.rewards:accuracy_reward", prompts, said, conversations=True)
    assert right.failures == () and right.values.tolist() == [1.0, 0.0]
    tagged = ["<think>\na\n</think>\n4", "7"]
    shaped = reward("trl.rewards:think_format_reward", prompts, tagged, conversations=True)
    assert shaped.failures == () and shaped.values.tolist() == [1.0, 0.0]


def test_what_only_a_trainer_has_is_a_named_failure(tmp_path: Path):
    prompts = DatasetPrompts(source=save(tmp_path / "set", TRL_CONVERSATIONS)).load()
    scores = reward("tests.rollout.test_prompts:wants_the_trainer", prompts, ["4", "7"])
    assert [failure.reason for failure in scores.failures] == ["exception"] * 2
    assert "'trainer_state'" in scores.failures[0].message
