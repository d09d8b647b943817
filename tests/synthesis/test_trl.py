"""What was written loads in the trainer of its task's type, as it is, and trains a step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from synthesis_parts import make_parts, synthesizer
from tiny import byte_level_tokenizer
from tiny_models import tiny_model
from transformers import (
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from hf_fac.tasks.task import get_task

SETTINGS = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "logging_steps": 1}


@pytest.fixture(scope="module")
def parts():
    return make_parts()


def written(parts, task, form="json"):
    featurizer, dictionary, report = parts
    dataset = synthesizer(featurizer, dictionary, report, task=task, prompt_format=form).synthesize(report).dataset
    assert len(dataset) > 4
    return dataset


def trained(trainer):
    trainer.train()
    assert trainer.state.global_step == 1
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses
    assert np.isfinite(losses).all()
    return trainer


def classifier(num_labels):
    config = LlamaConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=num_labels,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config)


@pytest.mark.parametrize("type_", ["prompt_completion", "messages"])
def test_instructions_train_with_sft(parts, type_, tmp_path):
    from trl import SFTConfig, SFTTrainer

    task = replace(get_task("instruction_following"), type=type_)
    dataset = written(parts, task)
    trainer = trained(
        SFTTrainer(
            tiny_model(),
            SFTConfig(str(tmp_path), **SETTINGS),
            train_dataset=dataset,
            processing_class=byte_level_tokenizer(),
        )
    )
    assert len(trainer.train_dataset) == len(dataset)


@pytest.mark.parametrize("type_", ["preference", "implicit_preference"])
def test_preferences_train_a_reward_model(parts, type_, tmp_path):
    from trl import RewardConfig, RewardTrainer

    task = replace(get_task("helpfulness"), type=type_)
    dataset = written(parts, task)
    trainer = trained(
        RewardTrainer(
            classifier(1),
            RewardConfig(str(tmp_path), **SETTINGS),
            train_dataset=dataset,
            processing_class=byte_level_tokenizer(),
        )
    )
    assert len(trainer.train_dataset) == len(dataset)


@pytest.mark.parametrize("task", ["sycophancy", "survival_instinct"])
def test_contrastive_items_train_with_dpo(parts, task, tmp_path):
    from trl import DPOConfig, DPOTrainer

    dataset = written(parts, task)
    tiny_model().save_pretrained(tmp_path / "model")
    trained(
        DPOTrainer(
            str(tmp_path / "model"),
            args=DPOConfig(str(tmp_path), **SETTINGS),
            train_dataset=dataset,
            processing_class=byte_level_tokenizer(),
        )
    )


@pytest.mark.parametrize("form", ["json", "text"])
def test_labelled_texts_train_a_classifier(parts, form, tmp_path):
    tokenizer = byte_level_tokenizer()
    dataset = written(parts, "toxicity", form)
    tokenized = dataset.map(lambda row: tokenizer(row["text"], truncation=True, max_length=64))
    trained(
        Trainer(
            classifier(2),
            TrainingArguments(str(tmp_path), **SETTINGS),
            train_dataset=tokenized,
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
        )
    )
