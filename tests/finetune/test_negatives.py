"""Masks, guide, distillation and controls of run.py, end to end on a tiny model and against what they come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune.helpers import log_lines, rows, run_training, train_words, write_rows
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from FlagEmbedding.finetune.parsing import parse_arguments
from FlagEmbedding.finetune.runner import build_trainer
from FlagEmbedding.finetune.trainer import BiEncoderTrainer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows: three ask the same, and the positive of each stands among another one's negatives."""
    records = rows(8, negatives=2)
    for i, record in enumerate(records):
        record["neg"][0] = records[(i + 1) % 8]["pos"][0].upper()  # the same text to a reader of utils.texts
        record |= {"pos_scores": [0.9], "neg_scores": [0.8, 0.1]}
    for i in (2, 5):
        records[i]["query"] = records[0]["query"]
    return write_rows(tmp_path_factory.mktemp("rows") / "data/a.jsonl", records).parent


def trainer_of(model: Path, data: Path, tmp_path: Path, **options: Any) -> tuple[BiEncoderTrainer, dict[str, Any]]:
    """A trainer and its first batch, all eight rows."""
    words = train_words(model, data, tmp_path / "out", per_device_train_batch_size=8, cache_path=tmp_path, **options)
    trainer = build_trainer(parse_arguments(words))
    batch = next(iter(trainer.get_train_dataloader()))
    batch.pop("rows")
    return trainer, batch


def texts_of(trainer: BiEncoderTrainer) -> list[Any]:
    dataset = trainer.train_dataset
    return [dataset[key] for key in next(iter(trainer.batch_sampler))]


def expected_mask(examples: list[Any]) -> torch.Tensor:
    """Passages that are, but for case, a positive of a row of the same query; the own positive is none."""
    passages = [text.lower() for e in examples for text in e.plain.passages]
    found = torch.zeros(len(examples), len(passages), dtype=torch.bool)
    for i, example in enumerate(examples):
        answers = {p.lower() for e in examples if e.query == example.query for p in e.plain.positives}
        for m, passage in enumerate(passages):
            found[i, m] = passage in answers and m != 3 * i
    return found


@pytest.mark.parametrize("engine", [{}, {"grad_cache": True, "slab_tokens": 60}], ids=["whole", "grad_cache"])
def test_twins_are_left_out_and_counted(
    engine: dict[str, Any], tiny_model_dir: Path, data: Path, tmp_path: Path
) -> None:
    given = {"mask_twins": True, "penalty_weight": 0, "passage_instruction_for_retrieval": "text: ", **engine}
    trainer, batch = trainer_of(tiny_model_dir, data, tmp_path, **given)
    mask = expected_mask(texts_of(trainer))
    model = trainer.bare_model.train()
    output = model(**batch)
    own = torch.arange(8) * 3
    scores = (output.q_reps @ output.p_reps.T / 0.02).masked_fill(mask, -torch.inf)
    expected = torch.nn.functional.cross_entropy(scores, own)
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=1e-6)
    assert 10 < int(output.terms["masked_twins"]) == int(mask.sum())
    weight = model.model.encoder.layer[0].intermediate.dense.weight
    output.loss.backward()
    ours, weight.grad = weight.grad.clone(), None
    if not engine:
        model(**{**batch, "keys": None}).loss.backward()
        assert not ours.allclose(weight.grad, rtol=1e-2), "the mask reaches the gradient"


def test_the_log_counts_and_the_published_run_says_it(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 4, "max_steps": 2}
    said = run_training(train_words(tiny_model_dir, data, tmp_path / "said", **options)).stderr
    assert said.count("as published): --mask_twins True leaves them out") == 1, "once, not every step"
    masked = run_training(train_words(tiny_model_dir, data, tmp_path / "masked", mask_twins=True, **options))
    assert "leaves them out" not in masked.stderr
    lines = log_lines(tmp_path / "masked")
    assert all(line["masked_twins"] > 0 for line in lines)
    assert lines[0]["loss"] < log_lines(tmp_path / "said")[0]["loss"]
    assert "twins of positives left out, per batch" in masked.stdout
    alone = [json.loads(line) for line in (data / "a.jsonl").read_text().splitlines()]
    for i, record in enumerate(alone):
        record |= {"neg": [f"passage {i} of another world"], "neg_q": [""], "neg_scores": [0.1]}
    write_rows(tmp_path / "alone/a.jsonl", alone)
    words = train_words(tiny_model_dir, tmp_path / "alone", tmp_path / "quiet", **{**options, "max_steps": 1})
    assert "stands in the batch again" not in run_training(words).stderr


def test_a_guide_reads_the_plain_texts_by_its_own_tokenizer(
    tiny_model_dir: Path, tiny_bert_dir: Path, data: Path, tmp_path: Path
) -> None:
    guide = tmp_path / "guide"
    reference = SentenceTransformer(str(tiny_bert_dir), device="cpu")  # without modules.json: mean
    reference.save(str(guide))
    given = {"false_negative_margin": -0.002, "guide_model": guide, "penalty_weight": 0.1, "query_max_len": 64}
    given |= {"query_instruction_for_retrieval": "find: "}
    trainer, batch = trainer_of(tiny_model_dir, data, tmp_path, **given)
    plain = [example.plain for example in texts_of(trainer)]
    reference.max_seq_length = 48
    q, p = (torch.from_numpy(reference.encode(texts, normalize_embeddings=True)) for texts in (
        [each.query for each in plain], [text for each in plain for text in each.passages]
    ))  # fmt: skip
    cosines, own = q @ p.T, torch.arange(8) * 3
    mask = cosines > cosines.gather(1, own[:, None]) + 0.002
    state = torch.random.get_rng_state()
    output = trainer.bare_model.eval()(**batch)
    assert state.equal(torch.random.get_rng_state())
    assert 0 < mask.sum() < 8 * 23 and int(output.terms["masked_by_margin"]) == int(mask.sum())
    scores = (output.q_reps @ output.p_reps.T / 0.02).masked_fill(mask, -torch.inf)
    expected = 0.9 * torch.nn.functional.cross_entropy(scores, own) + 0.1 * output.terms["penalty"]
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-5)
    assert not any(name.startswith("guide") for name, _ in trainer.bare_model.named_parameters())
    own_words = {"false_negative_margin": 0.0, "mask_twins": True, "penalty_weight": 0}
    trainer, batch = trainer_of(tiny_model_dir, data, tmp_path, **own_words)
    output = trainer.bare_model.eval()(**batch)
    cosines = output.q_reps @ output.p_reps.T
    near, twins = cosines > cosines.gather(1, own[:, None]), expected_mask(texts_of(trainer))
    assert int(output.terms["masked_by_margin"]) == int((near & ~twins).sum()) > 0
    scores = (cosines / 0.02).masked_fill(near | twins, -torch.inf)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(scores, own), rtol=1e-5, atol=1e-5)


def test_the_teachers_temperature_and_the_listwise_form(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    given = {"knowledge_distillation": True, "distill_temperature": 0.05, "penalty_weight": 0}
    trainer, batch = trainer_of(tiny_model_dir, data, tmp_path, **given, distill_loss="kl")
    output = trainer.bare_model.eval()(**batch)
    own = torch.stack([(output.q_reps[i] @ output.p_reps[3 * i : 3 * i + 3].T) / 0.02 for i in range(8)]).double()
    teacher = torch.tensor([e.teacher_scores for e in texts_of(trainer)], dtype=torch.float64) / 0.05
    expected = (teacher.softmax(1) * (teacher.log_softmax(1) - own.log_softmax(1))).sum(1).mean()
    assert output.loss.item() == pytest.approx(float(expected), rel=1e-5)
    # A twin of one's own group stays: the teacher says what it is worth. The rest is masked.
    trainer, batch = trainer_of(tiny_model_dir, data, tmp_path, **given, mask_twins=True)
    output = trainer.bare_model.eval()(**batch)
    mask = expected_mask(texts_of(trainer))
    for i in range(8):
        mask[i, 3 * i : 3 * i + 3] = False
    assert int(output.terms["masked_twins"]) == int(mask.sum()) > 0
    scores = (output.q_reps @ output.p_reps.T).double() / 0.02
    total = 0.0
    for i in range(8):
        for j in range(3):
            left = [m for m in range(24) if not mask[i, m] and not 3 * i <= m < 3 * i + j]
            log_p = scores[i, 3 * i + j] - scores[i, left].logsumexp(0)
            total -= (teacher[i].softmax(0)[j] * log_p).item() / 8
    assert output.loss.item() == pytest.approx(total, rel=1e-5)


def test_controls_at_equal_tokens(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """What each control is, from the vectors of the same batch: plain loss, other pulls, other rows."""
    cos = torch.nn.functional.cosine_similarity
    found = {}
    for name, options in {
        "none": {},
        "unused": {"neg_q_control": "unused"},
        "permuted": {"neg_q_control": "permuted"},
        "positive": {"neg_q_control": "positive"},
        "rows": {"neg_q_as_rows": True, "penalty_weight": 0, "mask_twins": True},
    }.items():
        trainer, batch = trainer_of(tiny_model_dir, data, tmp_path, **options)
        found[name] = (trainer.bare_model.eval()(**batch), batch)
        reps = trainer.bare_model(query=batch["neg_q"]).q_reps
        if name == "rows":
            examples, keys = texts_of(trainer), batch["keys"]
    (plain, batch), own = found["none"], torch.arange(8) * 3
    owner, p_reps = batch["owner"], plain.p_reps
    assert all(torch.equal(batch["neg_q"].ids, other["neg_q"].ids) for _, other in found.values()), "equal tokens"

    contrast = torch.nn.functional.cross_entropy(plain.q_reps @ p_reps.T / 0.02, own)
    assert found["unused"][0].loss.equal(plain.terms["contrastive_loss"])
    assert found["unused"][0].terms["penalty"].equal(plain.terms["penalty"])
    moved = found["permuted"][1]["owner"]
    assert sorted(moved.tolist()) == sorted(owner.tolist()) and (moved != owner).all()
    sham = (1 - cos(reps, p_reps[moved])).mean()  # each negative has one query
    torch.testing.assert_close(found["permuted"][0].loss, 0.9 * contrast + 0.1 * sham, rtol=1e-5, atol=1e-6)
    pull = (1 - cos(plain.q_reps, p_reps[own])).mean()
    torch.testing.assert_close(found["positive"][0].loss, 0.9 * contrast + 0.1 * pull, rtol=1e-5, atol=1e-6)

    mask = torch.cat([expected_mask(examples), keys.passages[owner][:, None] == keys.passages])
    targets = torch.cat([own, owner])
    mask[torch.arange(len(targets)), targets] = False
    scores = (torch.cat([plain.q_reps, reps]) @ p_reps.T / 0.02).masked_fill(mask, -torch.inf)
    expected = torch.nn.functional.cross_entropy(scores, targets)
    torch.testing.assert_close(found["rows"][0].loss, expected, rtol=1e-5, atol=1e-5)
    assert "penalty" not in found["rows"][0].terms and int(found["rows"][0].terms["masked_twins"]) == int(mask.sum())


REFUSED = {
    "--distill_loss kl has no effect without --knowledge_distillation": {"distill_loss": "kl"},
    "--distill_temperature has no effect without --knowledge_distillation": {"distill_temperature": 0.1},
    "--mask_twins and --distill_loss kl": {
        "knowledge_distillation": True, "distill_loss": "kl", "mask_twins": True,
    },
    "--neg_q_as_rows with --knowledge_distillation": {"knowledge_distillation": True, "neg_q_as_rows": True},
    "--neg_q_as_rows with --unified_finetuning": {"unified_finetuning": True, "neg_q_as_rows": True},
    "--neg_q_as_rows with --guide_model": {
        "neg_q_as_rows": True, "guide_model": "x", "false_negative_margin": 0.1,
    },
    "--neg_q_control permuted has no effect with --train_group_size 1": {
        "neg_q_control": "permuted", "train_group_size": 1,
    },
    "--false_negative_margin is a difference of cosines": {"false_negative_margin": 3},
    "no-such-guide": {"false_negative_margin": 0.1, "guide_model": "./no-such-guide"},
    "--ema_decay is the share of the average": {"ema_decay": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refused_in_one_line(message: str, tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    answer = run_training(train_words(tiny_model_dir, data, tmp_path / "out", **REFUSED[message]), check=False)
    assert answer.returncode == 2 and message in answer.stderr, answer.stderr
    assert "Traceback" not in answer.stderr and answer.stderr.strip().count("error:") == 1
    assert not (tmp_path / "out/model.safetensors").exists()


def test_unused_neg_q_moves_nothing(tiny_model_dir: Path, data: Path, tmp_path: Path) -> None:
    """Two steps with and without it, through grad_cache: the same weights, to rounding."""
    options = {"max_steps": 2, "grad_cache": True, "slab_tokens": 60, "learning_rate": 0.01, "optim": "sgd"}
    run_training(train_words(tiny_model_dir, data, tmp_path / "a", neg_q_control="unused", **options))
    run_training(train_words(tiny_model_dir, data, tmp_path / "b", penalty_weight=0, **options))
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(ours[name].allclose(theirs[name], rtol=1e-4, atol=1e-5) for name in ours)
    assert "penalty" in log_lines(tmp_path / "a")[0]
