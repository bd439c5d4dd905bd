"""The files of the team's set-up without an engine: valid, hardened, and with no secret missing or at hand."""

import json
import re
import tomllib
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.support.compose import ROOT, Missing, example, fill_in, load

SECRETS = ("POSTGRES_PASSWORD", "OPTUNA_DB_PASSWORD", "MLFLOW_DB_PASSWORD", "UI_PASSWORD", "MLFLOW_SECRET_KEY")
FILLED = {**example(), **{name: f"{name.lower()}-0123456789" for name in SECRETS}}


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = load(FILLED)["services"]
    return found


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    """Of the Compose Specification's own schema (tests/data/README.md)."""
    return Draft202012Validator(json.loads((ROOT / "tests/data/compose-spec.json").read_text()))


def test_the_file_is_valid(validator: Draft202012Validator) -> None:
    assert [error.message for error in validator.iter_errors(load(FILLED))] == []
    assert set(load(FILLED)["services"]) == {"postgres", "mlflow", "optuna-dashboard", "worker", "worker-cpu"}
    broken = load(FILLED)
    broken["services"]["worker"]["helthcheck"] = {}
    assert not validator.is_valid(broken)


@pytest.mark.parametrize("name", (*SECRETS, "STUDY", "DATA_DIR"))
def test_what_is_missing_is_an_error_that_says_where_to_set_it(name: str) -> None:
    with pytest.raises(Missing, match=rf"{name}: set {name} in .env, see .env.example"):
        load({**FILLED, name: ""})


def test_the_example_names_every_variable_and_holds_no_secret() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    used = set(re.findall(r"\$\{(\w+)", text))
    assert used <= set(re.findall(r"^(?:# )?(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert [name for name in SECRETS if example()[name]] == []
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    for line in text.splitlines():  # a password written out would be one for everybody
        if re.search(r"(PASSWORD|SECRET_KEY): ", line):
            assert ":?" in line, line


def test_ports_are_open_on_this_machine_only(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports), ports
    assert all("network_mode" not in service for service in services.values())


def test_no_container_is_root(services: dict[str, Any]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^USER (\S+)", dockerfile, re.MULTILINE) == ["search"]
    assert "USER" not in dockerfile.split("\nUSER search", 1)[1]
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        if "build" not in service:
            assert service["user"] not in ("root", "0"), name


def test_containers_write_into_volumes_alone_and_have_a_limit_of_memory(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True and "/tmp" in service["tmpfs"], name
        assert re.fullmatch(r"\d+g", service["mem_limit"]), name


def test_images_from_elsewhere_are_pinned_by_digest(services: dict[str, Any]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", dockerfile, re.MULTILINE))
    stages = re.findall(r"^FROM \S+ AS (\w+)$", dockerfile, re.MULTILINE)
    named = re.findall(r"^(?:FROM|# syntax=) ?(\S+)|^COPY --from=(\S+)", dockerfile, re.MULTILINE)
    images = {fill_in(image or source, arguments) for image, source in named} - set(stages)
    images |= {service["image"] for service in services.values() if "build" not in service}
    assert len(images) == 3, images
    for image in images:
        assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", image), image


def test_the_lock_has_hashes_of_every_version_that_is_tested() -> None:
    locked: dict[str, int] = {}
    for entry in re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text()):
        if not entry.startswith("#"):
            locked[entry.split()[0].lower()] = len(re.findall(r"--hash=sha256:[0-9a-f]{64}", entry))
    pinned = [line.lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]

    def same(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name)

    assert sorted(map(same, locked)) == sorted(map(same, pinned)), "make lock"
    assert all(locked.values())


def test_passwords_are_in_no_command_and_no_url(services: dict[str, Any]) -> None:
    values = [FILLED[name] for name in SECRETS]
    for name, service in services.items():
        shown = " ".join(service.get("command", ())) + json.dumps(service.get("healthcheck", {}))
        shown += " ".join(value for value in service["environment"].values() if "://" in value)
        assert not [value for value in values if value in shown], name


def test_services_start_in_order_and_are_watched(services: dict[str, Any]) -> None:
    healthy = {"condition": "service_healthy"}
    assert services["mlflow"]["depends_on"] == {"postgres": healthy}
    assert services["optuna-dashboard"]["depends_on"] == {"postgres": healthy}
    for worker in ("worker", "worker-cpu"):
        assert services[worker]["depends_on"] == {"postgres": healthy, "mlflow": healthy}
        assert "container_name" not in services[worker] and "ports" not in services[worker]  # --scale needs that
        assert services[worker]["restart"] == "on-failure:3"
    for name in ("postgres", "mlflow", "optuna-dashboard"):
        assert services[name]["healthcheck"]["test"][0] == "CMD"


def test_every_volume_is_declared_and_made_for_the_user(services: dict[str, Any]) -> None:
    declared = set(load(FILLED)["volumes"])
    mounted = {volume.split(":")[0]: volume.split(":")[1] for s in services.values() for volume in s["volumes"]}
    named = {source for source in mounted if not source.startswith((".", "/"))}
    assert named == declared
    made = re.search(r"chown search:search ([^\n]+)", (ROOT / "Dockerfile").read_text())
    assert made is not None
    # A named volume takes its owner from the folder in the image that it is mounted on.
    assert {mounted[name] for name in named - {"postgres"}} == set(made[1].split())
    for source in mounted:
        if source.startswith("./"):
            assert (ROOT / source).is_file(), source


def test_one_worker_has_the_gpus_and_the_other_none(services: dict[str, Any]) -> None:
    devices = services["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
    assert services["worker"]["build"]["args"] == {"VARIANT": "cuda"}
    assert "deploy" not in services["worker-cpu"] and services["worker-cpu"]["build"]["args"] == {"VARIANT": "cpu"}
    assert services["worker"]["environment"] == services["worker-cpu"]["environment"]


def test_the_image_copies_what_exists_and_pins_what_it_installs() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [
        name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE) for name in line.split()
    ]
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}" in ignored, name
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {"search", "trainer", "studies"} <= set(copied)
    assert packaged["project"]["readme"] in copied
    installs = re.findall(r"pip install [^\n]+", dockerfile)
    assert installs and all("--constraint constraints.txt" in line or "--no-deps" in line for line in installs)
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if line}
    wanted = packaged["project"]["dependencies"] + packaged["project"]["optional-dependencies"]["server"]
    assert [name for name in (re.split(r"[\[<>=!]", w)[0].lower() for w in wanted) if name not in pinned] == []
