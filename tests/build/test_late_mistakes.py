"""Names and options are checked before any data is opened, from the command line and from files."""

import numpy as np
import pytest
from flax import linen
from tiny import tiny_config

from dpjax import build, data
from dpjax.commands import cli

TINY = "from tiny import tiny_config\ndef get_config(): return tiny_config()\n"


class Couples(linen.Module):
    @linen.compact
    def __call__(self, images):
        return linen.Dense(4)((images - images.mean(0, keepdims=True)).mean((1, 2)))


COUPLES = Couples()

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
    "places of blocks": (["finetune=blocks:at:0,9"], "at=(0, 9) must be below the model's"),
    "a vote for all": (["finetune=vote:1"], "finetune='vote:1': 1 must be in 1..0"),
    "a vote for some": (["finetune=vote:some"], "finetune='vote:some' must be vote:K"),
    "a vote and more": (["finetune=vote:1+bias"], "with a whole number K, and no more"),
    "a vote without noise": (["finetune=vote:1", "dp=None"], "name the blocks instead"),
    "price of a vote": (["finetune=vote:1", "dp.vote=1.0"], "dp.vote=1.0 must be in (0, 1)"),
    "a vote and an audit": (["finetune=vote:1", "audit.count=9"], "does not go with audit.count=9"),
    "a vote and secure noise": (
        ["finetune=vote:1", "dp.noise=secure"],
        "does not go with dp.noise",
    ),
    "a vote of units": (["finetune=vote:1", "data.unit=who"], "does not go with data.unit='who'"),
    "a vote for nothing": (["finetune=vote:1", "lp.fraction=1"], "does not go with lp.fraction"),
    "a vote and its relation": (
        ["finetune=vote:1", "dp.sampler=fixed_size"],
        "does not go with dp.sampler='fixed_size'",
    ),
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
    "option of another type": (["model.options.depth=1.5"], "must be of type int"),
    "width 0": (["model.options.width=0"], "width=0 must be >= 1"),
    "moments that never fade": (["optimizer.options.b1=1.0"], "b1=1.0 must be in [0, 1)"),
    "an optimizer that is none": (["optimizer.name=math:sqrt"], "of 'math:sqrt': must be"),
    "a schedule that is none": (["optimizer.schedule=math:sqrt"], "optimizer.schedule='math:sqrt'"),
    "a rule that is none": (["dp.clipping=math:sqrt"], "dp.clipping='math:sqrt'"),
    "a sampler that is none": (["dp.sampler=math:sqrt"], "dp.sampler='math:sqrt' must take"),
    "a model that is none": (["model.name=math:sqrt"], "model.name='math:sqrt': got an"),
    "data that is no function": (["data.name=math:nothing"], "math has no function 'nothing'"),
    "augmentation of no module": (["data.augmentation=nothing:x"], "cannot be imported"),
    "seed below 0": (["seed=-1"], "seed=-1 must be in [0, 2**32)"),
    "seed too large": (["seed=99999999999999999999"], "must be in [0, 2**32)"),
    "private seed below 0": (["private_seed=-1"], "private_seed=-1"),
    "no epochs": (["epochs=0"], "epochs=0.0 must be > 0"),
    "epochs not a number": (["epochs=nan"], "epochs=nan must be > 0"),
    "endless epochs": (["epochs=inf"], "epochs=inf must be > 0"),
    "empty batch": (["batch_size=0"], "batch_size=0 must be 'auto' or a whole number"),
    "half an example": (["batch_size=2.5"], "batch_size=2.5"),
    "batch that is no number": (["batch_size=True"], "batch_size=True"),
    "physical batch": (["physical_batch=0"], "physical_batch=0"),
    "microbatch": (["microbatch=0"], "microbatch=0"),
    "log_every": (["log_every=0"], "log_every=0"),
    "checkpoint_every": (["checkpoint_every=-1"], "checkpoint_every=-1"),
    "keep_checkpoints": (["keep_checkpoints=0"], "keep_checkpoints=0"),
    "keep_best": (["keep_best=-1"], "keep_best=-1"),
    "average": (["ema=1"], "ema=1.0 must be in [0, 1)"),
    "average that is none": (["ema=nan"], "ema=nan"),
    "rate": (["optimizer.learning_rate=nan"], "optimizer.learning_rate=nan"),
    "warmup of more steps than there are": (["optimizer.warmup=8"], "must be in [0, steps=8)"),
    "warmup of a phase": (
        ["lp.fraction=0.5", "optimizer.warmup=4"],
        "optimizer.warmup=4 must be in [0, steps=4)",
    ),
    "probing without a step": (["lp.fraction=0.01"], "of 8 steps leaves none to the head"),
    "tuning without a step": (["lp.fraction=0.97"], "of 8 steps leaves none to finetune"),
    "a bound for no step": (
        ["dp.bound_schedule=((0.0,1.0),(0.99,2.0))"],
        "2.0 lasts less than one step",
    ),
    "more than all examples": (["batch_size=1618"], "whole number in 1..1617"),
    "a batch size for no step": (
        ["batch_size_schedule=((0.0,100),(0.99,1000))"],
        "1000 lasts less than one step",
    ),
    "a split that is not there": (["data.train_split=trian"], "Did you mean 'train'?"),
    "data that are not there": (["data.name=digitz"], "Did you mean 'digits'?"),
    "a model that couples examples": (
        ["model.name=test_late_mistakes:Couples", "model.options={'image_size': 14}"],
        "examples are coupled",
    ),
    "a dtype of a module that has its own": (
        ["model.name=test_late_mistakes:COUPLES", "model.dtype=bfloat16"],
        "model.dtype='bfloat16': 'test_late_mistakes:COUPLES' is a module",
    ),
    "a slice that ends before it begins": (["data.train_split=train[9:1]"], "has no examples"),
    "a budget that is none": (["dp.epsilon=1e9"], "dp.epsilon=1e+09 must be <= 1e+06"),
    "canaries of a negative number": (["audit.count=-5"], "audit.count=-5 must be >= 1"),
    "an end of no blocks": (["finetune=blocks:first:0"], "must be >= 0 and not both 0.\n"),
    "warmup of half a step": (["optimizer.warmup=1.5"], "must be a whole number"),
    "probing share": (["lp.fraction=1.5"], "lp.fraction=1.5 must be in [0, 1]"),
    "probing noise": (["lp.noise_ratio=0"], "lp.noise_ratio=0.0 must be > 0"),
    "probing rate": (["lp.learning_rate=0"], "lp.learning_rate=0.0 must be > 0"),
    "epsilon": (["dp.epsilon=0"], "dp.epsilon=0.0"),
    "epsilon not a number": (["dp.epsilon=nan"], "dp.epsilon=nan"),
    "bound": (["dp.bound=0"], "dp.bound=0.0"),
    "endless bound": (["dp.bound=inf"], "dp.bound=inf"),
    "cut at nothing": (
        ["dp.sampler=truncated_poisson", "dp.max_batch_size=0"],
        "dp.max_batch_size=0 must be >= 1",
    ),
    "quantile": (["dp.adaptive.quantile=1.5"], "dp.adaptive.quantile=1.5"),
    "count noise": (
        ["dp.adaptive.quantile=0.5", "dp.adaptive.count_noise=0"],
        "dp.adaptive.count_noise=0.0",
    ),
    "share": (["dp.temperature.share=1.5"], "dp.temperature.share=1.5 must be in [0, 1)"),
    "signs": (
        ["dp.temperature.share=0.1", "dp.temperature.steps=0"],
        "dp.temperature.steps=0",
    ),
    "derivative": (
        ["dp.temperature.share=0.1", "dp.temperature.bound=nan"],
        "dp.temperature.bound=nan",
    ),
    "temperature of replaced examples": (
        ["dp.temperature.share=0.1", "dp.sampler=fixed_size"],
        "accounted for replacing one",
    ),
    "border": (["data.pad=-1"], "data.pad=-1 must be >= 0"),
    "noise on pixels": (["data.pixel_noise=-1"], "data.pixel_noise=-1.0"),
    "views": (["data.multiplicity=4"], "needs an augmentation"),
    "held out": (["data.holdout=1.5"], "data.holdout=1.5 must be in (0, 1)"),
    "part": (["data.subset=0"], "data.subset=0 must be a fraction"),
    "part that is none": (["data.subset=x"], "data.subset='x'"),
    "side": (["data.host_image_size=0"], "image_size=0"),
    "no name": (["data.name="], "data.name='' must not be empty"),
    "no split": (["data.train_split="], "data.train_split='' must not be empty"),
    "rank": (["finetune=lora:0"], "rank=0"),
    "rank that is none": (["finetune=lora:x"], "finetune='lora:x' is not understood"),
    "empty set": (["finetune="], "finetune=''"),
    "open bracket": (["finetune=regex:("], "is not a regular expression"),
    "adapters twice": (["finetune=lora:2+lora:4"], "which has an adapter already"),
    "canaries": (["audit.count=9", "audit.canaries=gradiant"], "Did you mean 'gradient'?"),
}


@pytest.fixture(scope="module", autouse=True)
def _prepared():
    """A command opens the data as an earlier run has left them."""
    for split in ("train", "test"):
        data.load("digits", split=split)


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


@pytest.mark.parametrize("channels", [3, 2, 4])
def test_images_of_another_kind_name_the_field(channels):
    train = data.from_arrays("x", np.zeros((4, 14, 14, channels), np.uint8), [0, 1, 0, 1],
                             class_names=("a", "b"), split="train")  # fmt: skip
    text = rf"have {channels} channels .* set model\.options\.channels={channels}"
    with pytest.raises(ValueError, match=text):
        build.build(tiny_config(batch_size=2), datasets=(train, train))


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({"name": "resnet8"}, "lora adapts dense layers, and this model has none"),
        ({"name": "wide_resnet", "size": "16_4"}, "lora adapts dense layers, and this model has"),
        (
            {
                "name": "test_late_mistakes:Couples",
                "options": {"image_size": 14, "channels": 1},
            },
            "matches none of the 1 dense layers, such as Dense_0",
        ),
    ],
)
def test_adapters_for_a_model_without_dense_layers(model, text):
    changes = {f"model__{name}": value for name, value in ({"options": {}} | model).items()}
    with pytest.raises(ValueError, match=rf"finetune='lora:2': .*{text}"):
        build.build(tiny_config(**changes, finetune="lora:2"))
