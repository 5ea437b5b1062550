# Runs once all packages are installed; $1 is the new root. KEEP: a pattern of module names. META: the kernel's meta
# package. SUITE: the release.
set -eu
root="$1"
side="$root/clan-kernel"
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"

# The kernel is unpacked, not installed: installing would pull in tools that make an initramfs. The meta package names
# the current one.
package="$(apt-cache depends "$META" | sed -n 's/^ *Depends: \(linux-image-[0-9][^ ]*\)$/\1/p' | head -n 1)"
test -n "$package" || { echo "E: $META depends on no kernel package" >&2; exit 1; }
echo "I: kernel package $package" >&2
mkdir "$side"
(cd "$side" && apt-get -o APT::Sandbox::User=root download "$package" && mv ./*.deb kernel.deb)
chroot "$root" dpkg-deb -x /clan-kernel/kernel.deb /clan-kernel/all
rm "$side/kernel.deb"
version="$(ls "$side/all/lib/modules")"
chroot "$root" depmod -b /clan-kernel/all "$version"

# A line of the index names a module and everything that it needs.
from="$side/all/lib/modules/$version"
into="$root/usr/lib/modules/$version"
mkdir -p "$into"
awk -v keep="^($KEEP)\$" '{
  path = $1; sub(/:$/, "", path)
  name = path; sub(/.*\//, "", name); sub(/\.ko.*/, "", name); gsub(/-/, "_", name)
  if (name ~ keep) { print path; for (i = 2; i <= NF; i++) print $i }
}' "$from/modules.dep" | LC_ALL=C sort -u >"$side/list"
(cd "$from" && tar -cf - -T "$side/list" modules.order modules.builtin modules.builtin.modinfo) | tar -C "$into" -xf - --no-same-owner
chroot "$root" depmod "$version"

mkdir "$side/out"
cp "$side/all/boot/vmlinuz-$version" "$side/out/vmlinuz"
cp -r "$into" "$side/out/modules"
rm -r "$side/all" "$side/list"

# Which of these there are depends on the tools of the computer that builds.
for dir in lib32 libo32 libx32; do
  if rmdir "$root/usr/$dir" 2>/dev/null; then rm -f "$root/$dir"; fi
done

# Nothing of this run or this computer stays in the image.
rm -f "$root"/etc/apt/apt.conf.d/99mmdebstrap "$root"/etc/hostname "$root"/etc/resolv.conf "$root"/etc/machine-id
rm -f "$root"/var/lib/dbus/machine-id "$root"/var/lib/systemd/random-seed "$root"/etc/ssh/ssh_host_* "$root"/etc/.pwd.lock
rm -f "$root"/var/log/*.log "$root"/var/log/apt/* "$root"/var/cache/ldconfig/aux-cache "$root"/var/cache/debconf/*-old "$root"/var/lib/dpkg/*-old
rm -f "$root"/etc/passwd- "$root"/etc/shadow- "$root"/etc/group- "$root"/etc/gshadow-
cat >"$root/etc/apt/sources.list" <<EOF
deb http://deb.debian.org/debian $SUITE main
deb http://deb.debian.org/debian $SUITE-updates main
deb http://deb.debian.org/debian-security $SUITE-security main
EOF
