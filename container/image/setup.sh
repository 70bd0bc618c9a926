#!/bin/sh
# The last step of the agent image, inside it, as root, after its packages: the user, the folders, and nothing left
# that is no use in a sandbox or that tells of the machine it was made on. The Dockerfile and build.sh both run it.
set -eu

groupadd --gid 1000 job
useradd --uid 1000 --gid 1000 --home-dir /home/job --create-home --shell /bin/bash job
# A sandbox's job has a uid and a gid of its own, out of the ranges that docs/configuration.md tells (docker.first_uid); all
# of them are called as that user.
awk 'BEGIN { for (n = 0; n < 1024; n++) {
  for (first = 10000; first <= 1879200000; first += 1879190000) {
    printf "job:x:%d:%d::/home/job:/bin/bash\n", first + n, first + n >>"/etc/passwd"
    printf "job:x:%d:\n", first + n >>"/etc/group"
  }
} }'
# The node mounts these; an image that has them spares the engine making them.
mkdir -p /workspace /job
chown job:job /workspace

# The repository may belong to another user than the job's; in a sandbox of one customer all of it is his.
git config --system safe.directory '*'

# Nothing here may become another user. The sandbox forbids it anyway.
find / -xdev -type f -perm /6000 -exec chmod a-s {} +

find /usr/share/doc -mindepth 2 ! -name copyright ! -type d -delete
find /usr/share/doc -mindepth 1 -type d -empty -delete
rm -rf /usr/share/man/* /usr/share/info/* /usr/share/locale/* /usr/share/lintian
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig /var/lib/dpkg/*-old
find /var/log -type f -delete
rm -f /etc/machine-id /var/lib/dbus/machine-id /etc/ssh/ssh_host_* /etc/*- /root/.bash_history
