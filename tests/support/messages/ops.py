"""Wrong calls: ops."""

import itertools
import warnings

import torch

import maestro_kernels as mk
from maestro_kernels.testing import make_inputs
from messages import Row

X, U, V, B = make_inputs(4, 6, 8, 3)
# Large enough for two library matmuls: the calls above are the native library's.
WIDE = make_inputs(64, 96, 80, 32)
DEVICE_RANK = torch.tensor(2, dtype=torch.int32)
NAMES = ("x", "u", "v", "bias")


def freed(tensor):
    """A copy without its memory, as FSDP leaves parameters."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def nested(tensor):
    return torch.nested.nested_tensor([tensor, tensor])


def quantised(tensor):
    warnings.simplefilter("ignore")
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8)


# What stands for a tensor, the error, and what it says after the name of the argument.
KINDS = {
    "sparse": (
        torch.Tensor.to_sparse,
        TypeError,
        "expected a dense tensor, got a torch.sparse_coo",
    ),
    "nested": (nested, TypeError, "expected a dense tensor, got a nested one"),
    "quantised": (quantised, TypeError, "expected a dense tensor, got quantised torch.quint8"),
    "a list": (torch.Tensor.tolist, TypeError, "expected a Tensor, got list"),
    "None": (lambda _: None, TypeError, "expected a Tensor, got NoneType"),
    "freed": (freed, ValueError, "expected a storage of at least"),
}


def replaced(call, tensors, i, kind, *, remembered):
    """The call with argument i of another kind, after a right one where a plan is to be known."""
    if remembered:
        call(*tensors)
    return call(*tensors[:i], KINDS[kind][0](tensors[i]), *tensors[i + 1 :])


def grouped(x, u, v, bias):
    return mk.lod_linear_grouped(x, [WIDE[1], u], [WIDE[2], v], [WIDE[3], bias])


def backward_of_freed(call, i):
    """Free an argument between forward and backward."""
    tensors = [t.clone().requires_grad_() for t in WIDE]
    y = call(*tensors)
    tensors[i].untyped_storage().resize_(0)
    (y if isinstance(y, torch.Tensor) else y[1]).sum().backward()


def kinds():
    """Every argument of every call in every wrong kind, planned for the first time and again."""
    calls = {
        "lod_linear": (mk.lod_linear, (X, U, V, B), "lod_linear: {}: "),
        "lod_linear of two matmuls": (mk.lod_linear, WIDE, "lod_linear: {}: "),
        "explain": (mk.explain, WIDE, "lod_linear: {}: "),
        "lod_linear_grouped": (grouped, WIDE, "lod_linear_grouped: {}: "),
    }
    for (title, (call, tensors, prefix)), (i, name), remembered in itertools.product(
        calls.items(), enumerate(NAMES), (False, True)
    ):
        for kind, (_, error, text) in KINDS.items():
            if (name, kind) in (("bias", "None"), ("x", "None")) or (name, kind) == ("x", "a list"):
                continue  # no bias; for x see below, where a group says it in other words
            if title == "explain" and kind == "a list":
                continue  # that is a group
            in_group = {"x": "x", "u": "us[1]", "v": "vs[1]", "bias": "biases[1]"}[name]
            shown = in_group if title == "lod_linear_grouped" else name
            yield Row(
                f"{title}: {kind} for {name}{', plan known' if remembered else ''}",
                lambda _, c=call, t=tensors, i=i, k=kind, r=remembered: replaced(
                    c, t, i, k, remembered=r
                ),
                error,
                prefix.format(shown) + text,
            )


ROWS = [
    Row(
        "lod_linear: x on another device",
        lambda _: mk.lod_linear(X.to("meta"), U, V),
        ValueError,
        "lod_linear: u: expected device meta like x, got cpu",
    ),
    Row(
        "lod_linear: integer x",
        lambda _: mk.lod_linear(X.to(torch.int64), U, V),
        TypeError,
        "lod_linear: x: expected dtype float16, bfloat16, float32, float64, got torch.int64",
    ),
    *kinds(),
    *(
        Row(
            f"lod_linear: x is {title}",
            lambda _, x=x: mk.lod_linear(x, U, V),
            TypeError,
            f"lod_linear: x: expected a Tensor, got {got}",
        )
        for title, x, got in (("a list", X.tolist(), "list"), ("None", None, "NoneType"))
    ),
    *(
        Row(
            f"{title}: {name} freed before the backward",
            lambda _, c=call, i=i: backward_of_freed(c, i),
            ValueError,
            f"{title} backward: {name}: expected a storage of at least",
        )
        for title, call, names in (
            ("lod_linear", lambda *t: mk.lod_linear(*t, activation="silu"), ("x", "u", "v")),
            ("lod_linear_grouped", grouped, ("x", "us[1]", "vs[1]")),
        )
        for i, name in enumerate(names)
    ),
    *(
        Row(
            f"lod_linear_grouped: {name} = {value!r}",
            lambda _, a=arguments: mk.lod_linear_grouped(
                *(a[n] for n in ("x", "us", "vs", "biases")),
                ranks=a["ranks"],
                activation=a["activation"],
            ),
            error,
            f"lod_linear_grouped: {shown}: {text}",
        )
        for name, value, shown, error, text in (
            (
                "x",
                None,
                "x",
                TypeError,
                "expected one tensor or a sequence of tensors, got NoneType",
            ),
            ("x", 3, "x", TypeError, "expected one tensor or a sequence of tensors, got int"),
            ("x", [None], "x", TypeError, "expected a Tensor, got NoneType"),
            ("us", None, "us", TypeError, "expected a sequence of factors, got NoneType"),
            ("vs", "vv", "vs", TypeError, "expected a sequence of factors, got str"),
            ("biases", 3, "biases", TypeError, "expected None, a tensor or a sequence of those"),
            ("ranks", 2.0, "ranks", TypeError, "expected an int, None, an int32 tensor or a"),
            ("ranks", [2.0, 1], "ranks[0]", TypeError, "expected None, an int or a 0-d int32"),
            ("ranks", [DEVICE_RANK, True], "ranks[1]", TypeError, "expected None, an int or a 0-d"),
            ("ranks", [DEVICE_RANK, 4], "ranks[1]", ValueError, "expected 0 <= rank <= 3, got 4"),
            ("activation", 3, "activation", TypeError, "expected a name, None or a sequence"),
        )
        for arguments in [
            {"x": X, "us": [U, U], "vs": [V, V], "biases": None, "ranks": None, "activation": None}
            | {name: value}
        ]
    ),
]
