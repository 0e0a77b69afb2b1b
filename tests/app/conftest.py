import pytest


@pytest.fixture
def plain_accelerate(monkeypatch):
    """Without what a Trainer of another test has told accelerate, in variables that it leaves; nor is anything left."""
    accelerate = pytest.importorskip("accelerate")
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
