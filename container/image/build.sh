#!/usr/bin/env bash
# Makes the agent image from Debian packages, without a registry: the same as the Dockerfile beside it, whose suite
# and settings it reads, with the packages of packages.txt and the last step of setup.sh.
#
#   build.sh tar FILE          writes the image's files as a tar (`-`: to stdout; look at the exit code before use)
#   build.sh changes           prints the settings, one line for each --change of `docker import`
#   build.sh import [NAME]     both, into the engine that `docker` talks to (default: coinop-agent:SUITE);
#                              prints the image's id
#   --mirror URI, --security URI   before these: where packages come from (default: as in this machine's apt)
#
# Prints nothing else on stdout. Needs mmdebstrap, which needs root or unprivileged user namespaces (uidmap), and
# 2 GB below TMPDIR. SOURCE_DATE_EPOCH dates the files (default: today): the same packages and date give the same
# tar on one machine; on another, a few of Python's compiled files can differ.
set -euo pipefail

here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
suite=$(sed -n 's/^ARG SUITE=//p' "$here/Dockerfile")

say() { printf '   %s\n' "$*" >&2; }
die() { printf '   FAILED: %s\n' "$*" >&2; exit 1; }

packages() { sed '/^#/d; /^$/d' "$here/packages.txt"; }
changes() { grep -E '^(LABEL|ENV|WORKDIR|USER|CMD) ' "$here/Dockerfile"; }

# What this machine's apt calls the archive with that label. Where its lists were never fetched it knows no
# labels yet, and the suite's name must do. A machine of another Debian has the same mirror.
of_apt() { # LABEL SUITE
  command -v apt-get >/dev/null || return 0
  # shellcheck disable=SC2016 # apt expands them
  apt-get indextargets --format '$(LABEL)|$(RELEASE)|$(COMPONENT)|$(REPO_URI)' 'Created-By: Packages' |
    awk -F'|' -v label="$1" -v suite="$2" \
      '$3 == "main" && ($1 == label || $2 == suite && $1 !~ /^[A-Z]/) && !found { print $4; found = 1 }'
}

tar_to() {
  local file=$1
  command -v mmdebstrap >/dev/null ||
    die "there is no mmdebstrap: apt-get install mmdebstrap debian-archive-keyring (and uidmap, if not as root)"
  [ -n "$mirror" ] || mirror=$(of_apt Debian "$suite")
  [ -n "$mirror" ] || die "this machine's apt knows no mirror of Debian $suite: give one with --mirror URI"
  [ -n "$security" ] || security=$(of_apt Debian-Security "$suite-security")
  local sources=("deb $mirror $suite main")
  if [ -n "$security" ]; then
    sources+=("deb $security $suite-security main")
  else
    say "WITHOUT security updates: this machine's apt has no source of them (--security URI gives one)"
  fi
  # The machine's way to its mirror. As variables, since apt's options would stay in the image.
  if command -v apt-config >/dev/null; then
    eval "$(apt-config shell http_proxy Acquire::http::Proxy https_proxy Acquire::https::Proxy)"
    export http_proxy https_proxy
  fi
  # Today, not now: an image made twice a day from the same packages is the same. Not earlier, or the files of
  # a security update would look newer than Python's compiled ones.
  export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(($(date +%s) / 86400 * 86400))}

  local log started=$SECONDS; log=$(mktemp)
  say "installing $(packages | wc -l) packages and what they need from Debian $suite"
  # The sources and the names of this machine stay here: its mirror may be a private one.
  # shellcheck disable=SC2016 # mmdebstrap's shell expands them
  if ! mmdebstrap --variant=minbase --include="$(packages | paste -sd,)" \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --customize-hook="upload '$here/setup.sh' /setup.sh" \
    --customize-hook='chroot "$1" sh /setup.sh && rm "$1/setup.sh"' \
    --customize-hook='rm -f "$1"/etc/hostname "$1"/etc/resolv.conf "$1"/etc/apt/sources.list' \
    --customize-hook='rm -f "$1"/etc/apt/apt.conf.d/99mmdebstrap "$1"/etc/dpkg/dpkg.cfg.d/99mmdebstrap' \
    --format=tar "$suite" - "${sources[@]}" >"$file" 2>"$log"; then
    tail -n 40 "$log" >&2
    rm -f "$log"
    die "mmdebstrap, after $((SECONDS - started)) s"
  fi
  rm -f "$log"
  say "made in $((SECONDS - started)) s"
}

# A half-made file never has the name of a whole one.
whole_tar() {
  [ "$1" != - ] || { tar_to /dev/stdout; return; }
  trap 'rm -f "$1.part"' EXIT
  tar_to "$1.part"
  mv "$1.part" "$1"
}

import() {
  local name=${1:-coinop-agent:$suite} line options=() folder
  command -v docker >/dev/null || die "there is no docker command"
  docker version >/dev/null || die "no engine answers the docker command"
  while read -r line; do options+=(--change "$line"); done < <(changes)
  folder=$(mktemp -d)
  # shellcheck disable=SC2064 # this folder, whatever it is called later
  trap "rm -rf '$folder'" EXIT
  tar_to "$folder/tar"
  docker import "${options[@]}" "$folder/tar" "$name"
  say "$name: $(($(docker image inspect -f '{{.Size}}' "$name") / 1000000)) MB"
}

mirror='' security=''
while [ $# -gt 1 ]; do
  case $1 in
    --mirror) mirror=$2; shift 2 ;;
    --security) security=$2; shift 2 ;;
    *) break ;;
  esac
done
case ${1:-} in
  tar) whole_tar "${2:?say where to: a file, or - for stdout}" ;;
  changes) changes ;;
  import) import "${2:-}" ;;
  *) die "say what: tar FILE, changes or import [NAME]" ;;
esac
