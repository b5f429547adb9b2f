import pytest
import trained


@pytest.fixture(scope="session")
def language(tmp_path_factory):
    return trained.language_model(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="session")
def vision(tmp_path_factory):
    return trained.vision_model(tmp_path_factory.mktemp("vision"))
