#!/bin/bash
# Runs the kernels' tests on a processor that this machine does not have: Bochs as a Sapphire
# Rapids (AVX-512 with byte dots, AMX), a Linux kernel, and an initial file system with the
# test programs and nothing else. Minutes; docs/instruction-sets.md has what came out.
#
#     bench/emulate.sh BOCHS VMLINUZ 'TEST [ARGUMENT...]'...
#     bench/emulate.sh ~/bochs/bochs /boot/vmlinuz-6.1.0-56-amd64 lib 'products tiny_sums'
#
# BOCHS is a built source directory (./configure --enable-x86-64 --enable-avx --enable-evex
# --enable-amx --with-nogui), corrected as the document says. Debian's packages: isolinux
# syslinux-common xorriso busybox-static cpio. TEST is lib or an integration test of
# setun-backend.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 3 ] || { sed -n '2,14s/^# \{0,1\}//p' "$0" >&2; exit 2; }
bochs=$1 kernel=$2
shift 2

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
root="$work/root" disc="$work/disc"
mkdir -p "$root"/{bin,lib64,proc,dev,tmp,t} "$disc/isolinux"

# The newest program of each test.
cargo test --release -p setun-backend --lib --tests --no-run --message-format=json-render-diagnostics |
    python3 -c '
import json, sys
for line in sys.stdin:
    m = json.loads(line)
    if m.get("executable"):
        lib = "lib" in m["target"]["kind"]
        print("lib" if lib else m["target"]["name"], m["executable"])' > "$work/programs"
for test in "$@"; do
    name=${test%% *}
    program=$(awk -v name="$name" '$1 == name { print $2 }' "$work/programs")
    [ -n "$program" ] || { echo "no test called $name" >&2; exit 2; }
    [ -e "$root/t/$name" ] || strip -o "$root/t/$name" "$program"
    arguments=${test#"$name"}
    echo "echo \"== $test\"; /t/$name --test-threads 1 $arguments" >> "$root/tests"
done

cp /bin/busybox "$root/bin/"
for name in sh mount sleep poweroff; do ln -s busybox "$root/bin/$name"; done
cp -L /lib64/ld-linux-x86-64.so.2 "$root/lib64/"
for name in libc.so.6 libm.so.6 libgcc_s.so.1; do
    cp -L "/lib/x86_64-linux-gnu/$name" "$root/lib64/"
done
cat > "$root/init" <<'INIT'
#!/bin/sh
mount -t proc proc /proc
mount -t devtmpfs dev /dev
export LD_LIBRARY_PATH=/lib64
cd /tmp
. /tests 2>&1
echo "== end"
sleep 2
poweroff -f
INIT
chmod +x "$root/init"
(cd "$root" && find . | cpio -o -H newc --quiet | gzip -1) > "$disc/initrd.gz"

# Without ERMS and FSRM, whose repeated moves this emulator does not get right in the kernel.
cp "$kernel" "$disc/vmlinuz"
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$disc/isolinux/"
cat > "$disc/isolinux/isolinux.cfg" <<'CONFIG'
default tests
prompt 0
timeout 1
label tests
 kernel /vmlinuz
 append initrd=/initrd.gz console=ttyS0 quiet clearcpuid=297,580 no5lvl nokaslr mitigations=off
CONFIG
xorriso -as mkisofs -quiet -o "$work/tests.iso" -b isolinux/isolinux.bin -c isolinux/boot.cat \
    -no-emul-boot -boot-load-size 4 -boot-info-table "$disc" 2> "$work/xorriso.log"

cat > "$work/bochsrc" <<CONFIG
display_library: nogui
romimage: file=$bochs/bios/BIOS-bochs-latest
vgaromimage: file=$bochs/bios/VGABIOS-lgpl/VGABIOS-lgpl-latest.bin
megs: 2048
cpu: model=sapphire_rapids, count=1, ips=30000000
ata0-master: type=cdrom, path=$work/tests.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/serial.txt
log: $work/bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
clock: sync=none, time0=local
CONFIG
"$bochs/bochs" -q -f "$work/bochsrc" > "$work/out.txt" 2>&1 || true
sed -n '/^== /,$p' "$work/serial.txt" | tr -d '\r'
grep -q "^== end" "$work/serial.txt" || { tail -n 5 "$work/bochs.log" >&2; exit 1; }
! grep -q "test result: FAILED" "$work/serial.txt"
