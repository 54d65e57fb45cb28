"""Names and options are checked before any data is opened, from the command line and from files."""

import numpy as np
import pytest
from tiny import tiny_config

from dpjax import build, data
from dpjax.commands import cli

TINY = "from tiny import tiny_config\ndef get_config(): return tiny_config()\n"
MISTAKES = {
    "model": (["model.name=vitt"], "Did you mean 'vit'?"),
    "size": (["model.size=minni"], "Did you mean 'mini'?"),
    "option of a size": (["model.options.dept=1"], "Did you mean 'depth'?"),
    "value of an option": (["model.options.heads=3"], "model.options: "),
    "option of resnet8": (["model.name=resnet8"], "unexpected keyword argument"),
    "module": (["model.name=nothing:make"], "model.name='nothing:make' cannot be imported"),
    "head": (["model.head_init=zeros"], "head_init='zeros'"),
    "dtype": (["model.dtype=float8"], "model.dtype='float8'"),
    "tokenizer": (
        [
            "model.options={}",
            "model.name=text_encoder",
            "model.size=minilm_l6",
            "data.tokenizer=minilm_l6_tokeniser",
        ],
        "minilm_l6_tokenizer",
    ),
    "weights": (["model.weights=vit_mini_digitz"], "vit_mini_digits"),
    "fine-tuning set": (["finetune=heads"], "Did you mean 'head'?"),
    "part of a set": (["finetune=head+regex:zzz"], "matches none"),
    "blocks": (["finetune=blocks:last:9"], "finetune='blocks:last:9'"),
    "optimizer": (["optimizer.name=lion"], "optimizer.name='lion' must be one of adam"),
    "option of adam": (["optimizer.options.beta1=0.9"], "Did you mean 'b1'?"),
    "value of adam": (["optimizer.options.b1=high"], "optimizer.options={'b1': 'high'}"),
    "option of adam_corrected": (
        ["optimizer.name=adam_corrected", "optimizer.options.nesterov=true"],
        "optimizer.options field='nesterov' must be one of b1, b2, eps",
    ),
    "option without privacy": (["dp=None", "optimizer.options.beta1=0.9"], "Did you mean 'b1'?"),
    "optimizer without privacy": (["dp.epsilon=inf", "optimizer.name=adam_corrected"], "lamb, sgd"),
    "schedule": (["optimizer.schedule=cosin"], "Did you mean 'cosine'?"),
    "warmup": (["optimizer.warmup=-1"], "optimizer.warmup=-1"),
    "clipping": (["dp.clipping=flatt"], "Did you mean 'flat'?"),
    "sampler": (["dp.sampler=shuffle"], "dp.sampler='shuffle'"),
    "cut of a sampler": (["dp.max_batch_size=9"], "dp.max_batch_size=9"),
    "engine": (["dp.method=ghost"], "dp.method='ghost'"),
    "budget": (["dp.delta=2"], "dp.delta=2"),
    "augmentation": (["data.shift=-1"], "data: an augmentation"),
    "crop": (["data.crop=14"], "padding=14"),
    "resampling": (["data.resample=cubic"], "data.resample='cubic'"),
    "batch": (["batch_size=autoo"], "batch_size='autoo'"),
    "bounds": (["dp.bound_schedule=((0.1,1.0),)"], "dp.bound_schedule"),
    "layout": (["sharding=zero"], "sharding='zero'"),
    "canaries": (["audit.count=9", "audit.canaries=gradiant"], "Did you mean 'gradient'?"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_no_data_is_opened_for_a_wrong_name(name, tmp_path, monkeypatch, capsys):
    overrides, text = MISTAKES[name]
    opened = []
    for reader in ("load", "load_text"):
        monkeypatch.setattr(data, reader, lambda *given, **options: opened.append(given))
    (tmp_path / "c.py").write_text(TINY)
    argv = [f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path / 'w'}"]
    assert cli.main(["train", *argv, *(f"--config.{change}" for change in overrides)]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert (err[:13], err.count("\n")) == ("dpjax train: ", 1)
    assert not opened
    assert not (tmp_path / "w").exists()


def test_images_of_another_kind_name_the_field(tmp_path):
    train = data.from_arrays("x", np.zeros((4, 14, 14, 3), np.uint8), [0, 1, 0, 1],
                             class_names=("a", "b"), split="train")  # fmt: skip
    with pytest.raises(ValueError, match=r"have 3 channels .* set model\.options\.channels=3"):
        build.build(tiny_config(batch_size=2), datasets=(train, train))


def test_adapters_for_a_model_without_dense_layers():
    config = tiny_config(model__name="resnet8", model__options={}, finetune="lora:2")
    with pytest.raises(ValueError, match="finetune='lora:2': lora adapts dense layers, and this"):
        build.build(config)
