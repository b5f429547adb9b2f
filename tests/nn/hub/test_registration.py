"""transformers learns of our quantizer whichever is imported first, and without us it says so."""

import subprocess
import sys
import textwrap

import pytest
from hub_models import mixed, small

import maestro_kernels as mk


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("m")
    model, _ = small("llama")
    return mk.save_pretrained(mixed(model), folder)


ORDERS = {
    "we": "import maestro_kernels; import transformers",
    "transformers": "import transformers; import maestro_kernels",
    "its models": "import transformers.modeling_utils; import maestro_kernels",
}


@pytest.mark.parametrize("first", ORDERS)
def test_either_may_be_imported_first(first, saved):
    run(
        f"""
        {ORDERS[first]}
        import transformers
        model = transformers.AutoModelForCausalLM.from_pretrained({str(saved)!r})
        assert type(model.model.layers[0].mlp.up_proj).__name__ == "LoDLinear"
        assert transformers.PreTrainedModel.save_pretrained.__wrapped__
        assert not hasattr(transformers.PreTrainedModel.save_pretrained.__wrapped__, "__wrapped__")
        """
    )


def test_importing_us_costs_nothing_of_transformers():
    run(
        """
        import sys
        import torch
        before = set(sys.modules)
        import maestro_kernels
        later = {name.split(".")[0] for name in set(sys.modules) - before}
        assert not later & {"transformers", "huggingface_hub", "safetensors", "tokenizers"}, later
        assert "maestro_kernels.nn.hub.quantizer" not in sys.modules
        assert "maestro_kernels.nn.hub.registration" in sys.modules
        import transformers
        assert "transformers.quantizers" not in sys.modules
        assert "maestro_kernels.nn.hub.quantizer" not in sys.modules
        """
    )


def test_without_us_a_load_ends_in_an_error_that_says_what_to_do(saved):
    done = run(
        f"""
        import transformers
        try:
            transformers.AutoModelForCausalLM.from_pretrained({str(saved)!r})
        except OSError as error:
            assert "import-maestro_kernels-first" in str(error), error
        else:
            raise AssertionError("random weights")
        """
    )
    assert "Unknown quantization type, got maestro_kernels" in done.stderr
