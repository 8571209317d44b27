"""The models against timm and torchvision, and every way in which a weights file can fit or not fit."""

from __future__ import annotations

import sys
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from engine import models, weights
from engine.classifier import CosineLinear
from engine.config import Config
from engine.errors import UserError
from engine.fusion import fuse
from engine.models import MODEL_NAMES, create_model, load_pretrained, seresnet50

SE_NAMES = [name for name in MODEL_NAMES if name.startswith("se")]


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


def with_lively_batchnorm(model: nn.Module) -> nn.Module:
    """Switches every residual branch on and moves the running statistics, so that each part shows in the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.3, 0.7, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model


def images(size: int = 48, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def torchvision_resnet50() -> nn.Module:
    torch.manual_seed(0)
    return with_lively_batchnorm(torchvision.models.resnet50()).eval()


@pytest.fixture
def resnet50_file(torchvision_resnet50, tmp_path):
    path = tmp_path / "resnet50.pth"
    torch.save(torchvision_resnet50.state_dict(), path)
    return path


@pytest.mark.parametrize("name", SE_NAMES)
def test_keys_and_shapes_are_timms(name):
    with torch.device("meta"):
        ours, theirs = create_model(name, num_classes=7), timm.create_model(name, num_classes=7)
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("name", [name for name in MODEL_NAMES if not name.startswith("se")])
def test_plain_models_have_torchvisions_keys_and_shapes(name):
    with torch.device("meta"):
        ours, theirs = create_model(name, num_classes=7), torchvision.models.get_model(name, num_classes=7)
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize(
    "name", ["seresnet18", "seresnet34", "seresnet50", "seresnet101", "seresnet152", "seresnext50_32x4d"]
)
def test_models_with_a_function_of_their_own(name):
    with torch.device("meta"):
        assert shapes(getattr(models, name)(num_classes=7)) == shapes(create_model(name, num_classes=7))


def test_initialisation_is_distributed_as_timms():
    torch.manual_seed(0)
    ours, theirs = create_model("seresnet18", num_classes=10), timm.create_model("seresnet18", num_classes=10)
    reference = theirs.state_dict()
    for key, tensor in ours.state_dict().items():
        if tensor.numel() < 1000:
            # BatchNorm is constant; the few small random tensors left are the classifier's and the SE biases.
            assert (tensor == tensor.flatten()[0]).all() == (reference[key] == reference[key].flatten()[0]).all(), key
        else:
            torch.testing.assert_close(tensor.std(), reference[key].std(), rtol=0.1, atol=0, msg=key)
    assert ours.layer1[0].bn2.weight.abs().max() == 0
    assert ours.layer1[0].bn1.weight.min() == 1


@pytest.mark.parametrize("name", ["seresnet18", "seresnet50"])
def test_timms_weights_give_timms_logits(name, tmp_path):
    torch.manual_seed(0)
    theirs = with_lively_batchnorm(timm.create_model(name, num_classes=5)).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    ours = create_model(name, num_classes=5)
    report = load_pretrained(ours, name, tmp_path / "timm.pth")
    assert report.fresh == ()
    assert report.loaded == len(theirs.state_dict())

    ours = ours.eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = theirs.to(memory_format=torch.channels_last)(images())
        torch.testing.assert_close(ours(images()), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01


@pytest.mark.parametrize(
    ("name", "scope", "line"),
    [
        ("seresnet18", "tail", "9 tails fused, 8 of them with SE"),
        ("seresnet18", "block", "8 SE modules fused"),
        ("resnet18", "tail", "9 tails fused, 0 of them with SE"),
        ("resnet18", "block", "nothing fused: resnet18 has no SE module; --fused-scope tail fuses its residual tails"),
    ],
)
def test_fusing_keeps_the_parameters_and_the_function(name, scope, line):
    torch.manual_seed(0)
    model = with_lively_batchnorm(create_model(name, num_classes=5)).double()
    x = images().double()
    expected, gradients = logits_and_gradients(model, x)
    parameters, keys = list(model.named_parameters()), list(model.state_dict())
    assert fuse(model, Config(model=name, fused_scope=scope)) == line
    # in this order an optimizer's state is written to a checkpoint
    assert [(key, id(p)) for key, p in model.named_parameters()] == [(key, id(p)) for key, p in parameters]
    assert list(model.state_dict()) == keys
    fused_logits, fused_gradients = logits_and_gradients(model, x)
    torch.testing.assert_close(fused_logits, expected)
    torch.testing.assert_close(fused_gradients, gradients)


def logits_and_gradients(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logits = model(x)
    return logits.detach(), list(torch.autograd.grad(logits.square().sum(), list(model.parameters())))


def test_a_block_that_has_no_fused_tail_is_named_and_its_se_is_fused():
    model = create_model("seresnet18", num_classes=5)
    model.layer2[1].relu = nn.Tanh()
    with pytest.warns(UserWarning, match=r"layer2\.1: .*Tanh"):
        line = fuse(model, Config(model="seresnet18"))
    assert line == "8 tails fused, 7 of them with SE; 1 other SE modules fused"


@pytest.mark.parametrize("name", ["seresnet18", "seresnet50"])
def test_training_gradients_are_timms(name):
    torch.manual_seed(0)
    theirs = with_lively_batchnorm(timm.create_model(name, num_classes=5)).double().train()
    ours = create_model(name, num_classes=5).double().train()
    ours.load_state_dict(theirs.state_dict())
    for model in (ours, theirs):
        nn.functional.cross_entropy(model(images(size=40, count=3).double()), torch.tensor([0, 3, 4])).backward()
    expected = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    assert min(grad.abs().max() for grad in expected.values()) > 0
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[key], rtol=1e-6, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}"
        )
    for key, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, theirs.get_buffer(key))


def test_torchvisions_weights_load_with_only_se_fresh(torchvision_resnet50, resnet50_file):
    model = create_model("seresnet50", num_classes=1000)
    report = load_pretrained(model, "seresnet50", resnet50_file)
    assert report.loaded == len(torchvision_resnet50.state_dict())
    assert len(report.fresh) == 1
    assert "SE gates" in str(report)
    assert "resnet50.pth" in str(report)

    missing, unexpected = model.load_state_dict(torchvision_resnet50.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all(".se." in key for key in missing)

    twin = timm.create_model("seresnet50")
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images()), twin.eval()(images()), rtol=1e-4, atol=1e-5)


def test_nearly_open_gates_keep_the_pretrained_features(torchvision_resnet50, resnet50_file):
    model = seresnet50(pretrained_path=resnet50_file).eval()
    with torch.no_grad():
        expected, features = torchvision_resnet50(images()), model(images())
    relative_error = (features - expected).norm() / expected.norm()
    assert relative_error < 0.05
    assert not any(block.se.fc2.weight.any() for block in model.layer4)
    # Open, yet alive: the gates and what feeds them must be able to learn.
    model.train()(images()).square().mean().backward()
    assert all(block.se.fc2.weight.grad.abs().max() > 0 for block in model.layer4)


@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [
        (None, ""),
        ("state_dict", ""),
        ("model", ""),
        ("state_dict", "module."),
        ("model", "_orig_mod."),
        (None, "module."),
    ],
)
def test_wrapped_and_prefixed_checkpoints_load(wrapper, prefix, tmp_path):
    torch.manual_seed(0)
    source = create_model("seresnet18", num_classes=3)
    state = {prefix + key: tensor for key, tensor in source.state_dict().items()}
    torch.save({wrapper: state, "epoch": 4} if wrapper else state, tmp_path / "last.pt")
    loaded = create_model("seresnet18", num_classes=3, pretrained_path=tmp_path / "last.pt")
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[key]), key


def test_safetensors_load(tmp_path):
    source = create_model("seresnet18", num_classes=3)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    loaded = create_model("seresnet18", num_classes=3, pretrained_path=str(tmp_path / "model.safetensors"))
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[key]), key


@pytest.mark.parametrize("has_classifier", [True, False])
def test_another_number_of_classes_leaves_the_classifier_fresh(has_classifier, tmp_path, caplog):
    source = create_model("seresnet18", num_classes=3).state_dict()
    if not has_classifier:
        del source["fc.weight"], source["fc.bias"]
    torch.save(source, tmp_path / "source.pth")
    torch.manual_seed(7)
    untouched = create_model("seresnet18", num_classes=5)
    torch.manual_seed(7)
    with caplog.at_level("INFO", logger="engine"):
        model = create_model("seresnet18", num_classes=5, pretrained_path=tmp_path / "source.pth")
    assert torch.equal(model.fc.weight, untouched.fc.weight)
    assert torch.equal(model.layer4[1].conv2.weight, source["layer4.1.conv2.weight"])
    assert f"classifier ({3 if has_classifier else 0} classes in the weights, 5 here)" in caplog.text


def test_weights_from_before_num_batches_tracked_load(tmp_path):
    source = create_model("resnet18", num_classes=3).state_dict()
    torch.save({k: v for k, v in source.items() if not k.endswith("num_batches_tracked")}, tmp_path / "old.pth")
    model = create_model("resnet18", num_classes=3, pretrained_path=tmp_path / "old.pth")
    assert torch.equal(model.conv1.weight, source["conv1.weight"])


@pytest.mark.parametrize(
    ("file_model", "wanted", "way_out"),
    [
        ("resnet34", "seresnet50", "looks like resnet34: pass --model resnet34 or seresnet34"),
        ("seresnet18", "resnet18", "looks like seresnet18: pass --model seresnet18"),
        ("seresnet34", "seresnet50", "looks like seresnet34: pass --model seresnet34"),
    ],
)
def test_weights_of_another_model_are_named(file_model, wanted, way_out, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(create_model(file_model, num_classes=3).state_dict(), path)
    model = create_model(wanted, num_classes=3)
    before = model.conv1.weight.clone()
    with pytest.raises(UserError, match=f"weights.pth: does not fit {wanted} .*{way_out}") as error:
        load_pretrained(model, wanted, path)
    assert "\n" not in str(error.value)
    assert torch.equal(model.conv1.weight, before)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("layer1.0.conv1.weight"), r"missing: layer1\.0\.conv1\.weight\)"),
        (lambda s: s.pop("layer1.0.se.fc1.bias"), r"missing: layer1\.0\.se\.fc1\.bias\)"),
        (lambda s: s.update(extra=torch.zeros(1)), r"unexpected: extra\)"),
        (
            lambda s: s.update({"conv1.weight": torch.zeros(64, 1, 7, 7)}),
            r"wrong shape: conv1\.weight \(64, 1, 7, 7\) instead of \(64, 3, 7, 7\)\)",
        ),
    ],
    ids=["missing", "part of SE missing", "unexpected", "wrong shape"],
)
def test_a_state_dict_that_almost_fits_is_refused(damage, message, tmp_path):
    state = create_model("seresnet18", num_classes=3).state_dict()
    damage(state)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=f"odd.pth: does not fit seresnet18 .*{message}; it looks like none of"):
        create_model("seresnet18", num_classes=3, pretrained_path=tmp_path / "odd.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_unreadable_files_are_user_errors(suffix, tmp_path):
    with pytest.raises(UserError, match=f"absent{suffix}: no such weights file"):
        create_model("seresnet18", num_classes=3, pretrained_path=tmp_path / f"absent{suffix}")

    whole = tmp_path / f"whole{suffix}"
    state = {"weight": torch.zeros(1000)}
    torch.save(state, whole) if suffix == ".pth" else save_file(state, whole)
    for name, content in {"cut": whole.read_bytes()[:300], "text": b"<html>not found</html>", "empty": b""}.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}{suffix}: cannot be read as weights") as error:
            create_model("seresnet18", num_classes=3, pretrained_path=path)
        assert "\n" not in str(error.value)


def test_a_pickled_module_is_refused_without_running_it(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(UserError, match=r"module\.pth: cannot be read as weights .*more in it than tensors"):
        create_model("seresnet18", num_classes=3, pretrained_path=tmp_path / "module.pth")


@pytest.mark.parametrize("content", [torch.zeros(3), {}, {"epoch": 3}, [torch.zeros(1)]])
def test_a_file_without_a_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: holds no state dict"):
        create_model("seresnet18", num_classes=3, pretrained_path=tmp_path / "other.pth")


def test_dropout_before_the_classifier_keeps_keys_and_start_and_is_off_in_evaluation():
    """And a cosine classifier loses its bias alone."""
    models = []
    for options in ({}, {"drop": 0.5}, {"cosine": True}):
        torch.manual_seed(0)
        models.append(create_model("resnet18", num_classes=3, **options))
    plain, dropping, cosine = models
    start = plain.state_dict()
    assert dropping.state_dict().keys() == start.keys()
    assert cosine.state_dict().keys() == start.keys() - {"fc.bias"}
    for model in (dropping, cosine):
        assert all(torch.equal(tensor, start[name]) for name, tensor in model.state_dict().items())

    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(dropping.eval()(images), plain.eval()(images))
    features = torch.ones(4000, plain.fc.in_features)
    dropping.train()
    with torch.no_grad():
        dropping.fc.weight.fill_(1 / plain.fc.in_features)
        dropping.fc.bias.zero_()
        kept = dropping.fc(features)[:, 0] / 2
    assert kept.mean().item() == pytest.approx(0.5, abs=0.01)
    assert kept.std().item() == pytest.approx(0.5 / plain.fc.in_features**0.5, rel=0.1)


@pytest.mark.parametrize(("before", "after"), (("linear", "cosine"), ("cosine", "linear")))
def test_a_linear_classifier_does_not_begin_a_cosine_one_nor_the_reverse(before, after, tmp_path):
    model = create_model("resnet18", num_classes=3, cosine=before == "cosine")
    torch.save(model.state_dict(), tmp_path / "before.pth")
    other = create_model("resnet18", num_classes=3, cosine=after == "cosine")
    report = load_pretrained(other, "resnet18", tmp_path / "before.pth")
    assert report.fresh == (f"classifier ({before} in the weights, {after} here)",)
    assert torch.equal(other.conv1.weight, model.conv1.weight)
    assert not torch.equal(other.fc.weight, model.fc.weight)


def test_unknown_names_and_numbers_of_classes_are_refused():
    with pytest.raises(UserError, match=r"--model seresnet51: unknown; choose one of .*seresnet50"):
        create_model("seresnet51", num_classes=3)
    with pytest.raises(UserError, match="--num-classes 0"):
        create_model("seresnet50", num_classes=0)


def test_pretrained_takes_torchvisions_own_weights(monkeypatch, torchvision_resnet50):
    asked = []

    def get_state_dict(self, **kwargs):
        asked.append((self.name, self.url, kwargs))
        return torchvision_resnet50.state_dict()

    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", get_state_dict)
    model = seresnet50(num_classes=4, pretrained=True)
    assert torch.equal(model.layer1[0].conv1.weight, torchvision_resnet50.layer1[0].conv1.weight)
    assert asked == [
        (
            "IMAGENET1K_V2",
            "https://download.pytorch.org/models/resnet50-11ad3fa6.pth",
            {"progress": True, "check_hash": True},
        )
    ]


@pytest.mark.parametrize("name", [name for name in MODEL_NAMES if not name.startswith("se")])
def test_every_plain_model_has_downloadable_weights(name, monkeypatch):
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda self, **_: {"url": self.url})
    assert f"/{name}-" in weights.download_imagenet_weights(name)["url"]


@pytest.mark.parametrize("failure", [URLError("no route"), RuntimeError("invalid hash value"), TimeoutError()])
def test_a_failing_download_points_to_pretrained_path(failure, monkeypatch):
    def fail(self, **_):
        raise failure

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fail)
    with pytest.raises(UserError, match=r"resnet34-.*\.pth .*--pretrained-path"):
        create_model("seresnet34", num_classes=3, pretrained=True)


def test_a_resnext_is_fused_whole():
    assert fuse(create_model("seresnext50_32x4d", num_classes=3), Config()) == "17 tails fused, 16 of them with SE"


TIMM = "timm:resnet10t"


def test_timms_models_train_fused_from_weights_of_timm(tmp_path, monkeypatch):
    """A classifier of other size is fresh; a file and timm's download do the same."""
    torch.manual_seed(0)
    source = timm.create_model("resnet10t", num_classes=5)
    torch.save(source.state_dict(), tmp_path / "timm.pth")
    built = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *args, pretrained=False, **o: source if pretrained else built(*args, **o)
    )
    for options in ({"pretrained_path": tmp_path / "timm.pth"}, {"pretrained": True}):
        model = create_model(TIMM, num_classes=3, drop=0.25, **options).double()
        assert shapes(model) == shapes(built("resnet10t", num_classes=3))
        assert model.drop_rate == 0.25
        assert torch.equal(model.layer4[0].conv2.weight, source.layer4[0].conv2.weight.double())
    with_lively_batchnorm(model).eval()
    expected = model(images().double())
    assert fuse(model, Config(model=TIMM)) == "7 tails fused, 0 of them with SE"
    torch.testing.assert_close(model(images().double()), expected)


def test_a_cosine_classifier_takes_the_place_of_timms():
    with torch.device("meta"):
        model = create_model("timm:regnetx_002", num_classes=3, cosine=True)
        assert type(model.head.fc) is CosineLinear
        with pytest.raises(UserError, match="one linear layer"):
            create_model("timm:resnetv2_50", num_classes=3, cosine=True)


def test_what_timm_cannot_give_is_said(monkeypatch):
    with pytest.raises(UserError, match=r"--model timm:resnet51: timm .* has no such model; near it are .*resnet50"):
        create_model("timm:resnet51", num_classes=3)
    with pytest.raises(UserError, match=r"--model timm:: unknown; choose one of .*, or timm:NAME"):
        Config(model="timm:")

    def fail(*args, **options):
        raise RuntimeError("No pretrained weights exist for resnet10t")

    def refuse(*args, **options):
        raise TypeError("unexpected keyword argument 'drop_rate'")

    model = create_model(TIMM, num_classes=3)
    model.pretrained_cfg = {"classifier": None}
    with monkeypatch.context() as patch:
        patch.setattr(timm, "create_model", lambda *args, **options: model)
        with pytest.raises(UserError, match=r"--model timm:resnet10t: it ends in no classifier"):
            create_model(TIMM, num_classes=3)
        patch.setattr(timm, "create_model", refuse)
        with pytest.raises(UserError, match=r"--model timm:resnet10t: timm cannot build it \(unexpected"):
            create_model(TIMM, num_classes=3)
        with pytest.raises(UserError, match=r"--drop 0\.5 does not go with --model timm:resnet10t \(unexpected"):
            create_model(TIMM, num_classes=3, drop=0.5)
    model = create_model(TIMM, num_classes=3)
    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(UserError, match=r"--pretrained: .*\(No pretrained weights exist.*--pretrained-path"):
        load_pretrained(model, TIMM)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"needs timm, which is not installed .*pip install timm"):
        create_model(TIMM, num_classes=3)
