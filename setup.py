"Build llmopt from `settings.ini`, the only source of its metadata."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def words(key):
    "The value of `key` as a list; values are separated by spaces or new lines"
    return cfg.get(key, "").split()


class SdistWithSettings(sdist):
    "An sdist that can build a wheel: it carries `settings.ini` too"

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, [*files, "settings.ini"])


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"],
    license=cfg["license"],
    license_files=["LICENSE"],
    keywords=words("keywords"),
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    package_data={cfg["lib_path"]: words("package_data")},
    install_requires=words("requirements"),
    extras_require={k.removesuffix("_requirements"): words(k) for k in cfg if k.endswith("_requirements")},
    entry_points={
        "console_scripts": words("console_scripts"),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    cmdclass={"sdist": SdistWithSettings},
    zip_safe=False,
)
