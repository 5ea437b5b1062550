//! Trial guests for KVM: a few instructions each, without QEMU.

use std::{
    io, mem,
    os::fd::AsRawFd,
    ptr, slice,
    time::{Duration, Instant},
};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

/// For both guests together.
const LIMIT: Duration = Duration::from_millis(90);
/// Ends `KVM_RUN` when the limit is over. Ignored by default, and blocked in this thread but for `KVM_RUN`, so it has
/// no effect on the rest of the program and needs no handler.
const SIGNAL: libc::c_int = libc::SIGURG;
/// `_IOW(KVMIO, 0x8b, struct kvm_signal_mask)`, where the structure is a length and a mask that follows it.
const KVM_SET_SIGNAL_MASK: libc::c_ulong = 0x4004_ae8b;

const MEMORY: usize = 2 << 20;
const PORT: u16 = 0xe9;
const CODE: usize = 0x8000;
const ON_INVALID_OPCODE: usize = 0x8100;
const STACK: u64 = 0x7000;

/// Why KVM does not run guests.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unusable {
    /// KVM refuses to make a guest.
    #[error("it refuses to {0}: {1}")]
    Refused(&'static str, kvm_ioctls::Error),
    /// The kernel speaks another version.
    #[error("it has an unknown interface version")]
    Version,
    /// No memory, timer or signal mask.
    #[error("the probe lacks resources: {0}")]
    Resources(io::Error),
    /// The guest stopped at something KVM cannot do.
    #[error("a trial guest fails in {mode} mode")]
    Stopped { mode: &'static str },
    /// The guest said something else than it should.
    #[error("a trial guest computes wrongly in {mode} mode")]
    Wrong { mode: &'static str },
    /// The guest takes far longer than hardware would.
    #[error("a trial guest is too slow in {mode} mode")]
    Slow { mode: &'static str },
}

/// Runs two guests to their end within 100 ms. Blocks; wants a thread of its own, whose signal mask it changes.
pub(super) fn run() -> Result<(), Unusable> {
    let deadline = Instant::now() + LIMIT;
    let _alarm = Alarm::set(LIMIT).map_err(Unusable::Resources)?;
    let kvm = Kvm::new().map_err(|e| Unusable::Refused("open", e))?;
    if kvm.get_api_version() != 12 {
        return Err(Unusable::Version);
    }
    Trial::real_mode(&kvm)?.run("real", b"R", deadline)?;
    Trial::long_mode(&kvm)?.run("long", b"ILX", deadline)
}

/// Counts to 1000, says R, halts.
const REAL_MODE: &[u8] = &[
    0xb9, 0xe8, 0x03, // mov cx, 1000
    0x49, 0x75, 0xfd, // dec cx; jnz
    0xb0, b'R', 0xe6, 0xe9, // out 0xe9, 'R'
    0xf4, // hlt
];

/// Says I after instructions that emulating hosts lack, L after 1.2 million instructions (hardware: below 2 ms), and
/// provokes an exception, whose handler says X.
const LONG_MODE: &[u8] = &[
    0xf3, 0x0f, 0xb8, 0xc0, // popcnt eax, eax
    0xbf, 0x00, 0x70, 0x00, 0x00, // mov edi, 0x7000
    0xf0, 0x48, 0x0f, 0xc7, 0x0f, // lock cmpxchg16b [rdi]
    0x66, 0x0f, 0xef, 0xc0, // pxor xmm0, xmm0
    0xb0, b'I', 0xe6, 0xe9, // out 0xe9, 'I'
    0xb9, 0xe0, 0x93, 0x04, 0x00, // mov ecx, 300_000
    0x50, 0x58, 0xff, 0xc9, 0x75, 0xfa, // push rax; pop rax; dec ecx; jnz
    0xb0, b'L', 0xe6, 0xe9, // out 0xe9, 'L'
    0x0f, 0x0b, // ud2
];
const INVALID_OPCODE_HANDLER: &[u8] = &[0xb0, b'X', 0xe6, 0xe9, 0xf4];

/// A guest with one processor. Fields drop in order: the memory goes last.
struct Trial {
    vcpu: VcpuFd,
    _vm: VmFd,
    _memory: Memory,
}

impl Trial {
    fn real_mode(kvm: &Kvm) -> Result<Self, Unusable> {
        Self::new(kvm, |memory, sregs| {
            sregs.cs.base = 0;
            sregs.cs.selector = 0;
            put(memory, CODE, REAL_MODE);
        })
    }

    fn long_mode(kvm: &Kvm) -> Result<Self, Unusable> {
        Self::new(kvm, |memory, sregs| {
            // Page tables: PML4, PDPT, and one 2 MiB page.
            put_u64(memory, 0x9000, 0xa003);
            put_u64(memory, 0xa000, 0xb003);
            put_u64(memory, 0xb000, 0x83);
            // GDT: null, 64-bit code, data. IDT: a gate for #UD.
            put_u64(memory, 0x508, 0x00af_9b00_0000_ffff);
            put_u64(memory, 0x510, 0x00cf_9300_0000_ffff);
            let handler = ON_INVALID_OPCODE as u64;
            put_u64(
                memory,
                0x1000 + 6 * 16,
                (handler & 0xffff) | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48,
            );
            put(memory, CODE, LONG_MODE);
            put(memory, ON_INVALID_OPCODE, INVALID_OPCODE_HANDLER);

            sregs.cr3 = 0x9000;
            sregs.cr4 = 0x620; // PAE, OSFXSR, OSXMMEXCPT
            sregs.cr0 = 0x8005_0033; // PG, AM, WP, NE, ET, MP, PE
            sregs.efer = 0x500; // LMA, LME
            sregs.cs = segment(8, 11, 1);
            let data = segment(16, 3, 0);
            (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
            (sregs.gdt.base, sregs.gdt.limit) = (0x500, 0x17);
            (sregs.idt.base, sregs.idt.limit) = (0x1000, 0xfff);
        })
    }

    fn new(kvm: &Kvm, prepare: impl FnOnce(&mut [u8], &mut kvm_sregs)) -> Result<Self, Unusable> {
        let refused = |what| move |error| Unusable::Refused(what, error);
        let vm = kvm.create_vm().map_err(refused("make a guest"))?;
        let mut memory = Memory::new().map_err(Unusable::Resources)?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: memory.0.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the region is a private mapping of that size, and `Trial` keeps it mapped for longer than the guest.
        unsafe { vm.set_user_memory_region(region) }.map_err(refused("give a guest memory"))?;
        let vcpu = vm.create_vcpu(0).map_err(refused("make a processor"))?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("describe the processor"))?;
        vcpu.set_cpuid2(&cpuid).map_err(refused("set the processor's features"))?;
        let mut sregs = vcpu.get_sregs().map_err(refused("read registers"))?;
        prepare(memory.bytes(), &mut sregs);
        vcpu.set_sregs(&sregs).map_err(refused("set registers"))?;
        let regs = kvm_regs { rip: CODE as u64, rsp: STACK, rflags: 2, ..Default::default() };
        vcpu.set_regs(&regs).map_err(refused("set registers"))?;
        unblock_while_running(&vcpu).map_err(Unusable::Resources)?;
        Ok(Self { vcpu, _vm: vm, _memory: memory })
    }

    fn run(mut self, mode: &'static str, expected: &[u8], deadline: Instant) -> Result<(), Unusable> {
        let mut said = Vec::new();
        loop {
            if Instant::now() >= deadline || said.len() > expected.len() {
                return Err(Unusable::Slow { mode });
            }
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(PORT, data)) => said.extend_from_slice(data),
                Ok(VcpuExit::Hlt) => return if said == expected { Ok(()) } else { Err(Unusable::Wrong { mode }) },
                Ok(_) => return Err(Unusable::Stopped { mode }),
                // The alarm, or a signal that is none of our business.
                Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {}
                Err(_) => return Err(Unusable::Stopped { mode }),
            }
        }
    }
}

fn segment(selector: u16, type_: u8, long: u8) -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        ..Default::default()
    }
}

fn put(memory: &mut [u8], at: usize, bytes: &[u8]) {
    memory[at..at + bytes.len()].copy_from_slice(bytes);
}

fn put_u64(memory: &mut [u8], at: usize, value: u64) {
    put(memory, at, &value.to_le_bytes());
}

/// A private anonymous mapping of [`MEMORY`] bytes.
struct Memory(ptr::NonNull<u8>);

impl Memory {
    fn new() -> io::Result<Self> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new anonymous mapping wherever the kernel likes touches no memory of ours.
        let address = unsafe { libc::mmap(ptr::null_mut(), MEMORY, protection, flags, -1, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        ptr::NonNull::new(address.cast()).map(Self).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is that long, readable, writable and zeroed; `&mut self` makes this the only reference,
        // and no guest runs while it is held.
        unsafe { slice::from_raw_parts_mut(self.0.as_ptr(), MEMORY) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this size, and no reference outlives `self`.
        unsafe { libc::munmap(self.0.as_ptr().cast(), MEMORY) };
    }
}

/// Sends [`SIGNAL`] to this thread when the time is over, and again every few milliseconds: the first one may arrive
/// just before `KVM_RUN` is entered.
struct Alarm(libc::timer_t);

impl Alarm {
    fn set(after: Duration) -> io::Result<Self> {
        let blocked = signals();
        // SAFETY: the set is initialised; changing this thread's own mask has no other effect.
        let result = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &blocked, ptr::null_mut()) };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        // SAFETY: all-zero is a valid value of this plain C structure.
        let mut event: libc::sigevent = unsafe { mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = SIGNAL;
        event.sigev_notify_thread_id = rustix::thread::gettid().as_raw_nonzero().get();
        let mut timer = ptr::null_mut();
        // SAFETY: both pointers are to live locals, the event is filled in, and the thread is this one.
        if unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let alarm = Self(timer);
        let every = libc::timespec { tv_sec: 0, tv_nsec: 2_000_000 };
        let first = libc::timespec { tv_sec: after.as_secs() as libc::time_t, tv_nsec: after.subsec_nanos().into() };
        let schedule = libc::itimerspec { it_interval: every, it_value: first };
        // SAFETY: the timer was made above and the schedule is a live local.
        if unsafe { libc::timer_settime(alarm.0, 0, &schedule, ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(alarm)
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: made by `timer_create` and deleted only here.
        unsafe { libc::timer_delete(self.0) };
    }
}

fn signals() -> libc::sigset_t {
    // SAFETY: sigemptyset and sigaddset initialise the set through pointers to a live local; the number is valid.
    unsafe {
        let mut set = mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, SIGNAL);
        set
    }
}

/// Lets signals through while the processor runs: they end `KVM_RUN`, and stay pending in this thread, which has
/// [`SIGNAL`] blocked.
fn unblock_while_running(vcpu: &VcpuFd) -> io::Result<()> {
    #[repr(C)]
    struct Mask {
        len: u32,
        signals: [u8; 8],
    }
    let mask = Mask { len: 8, signals: [0; 8] };
    // SAFETY: the file is a virtual processor, and the argument points to a `struct kvm_signal_mask` with `len` bytes
    // of mask, which the kernel only reads.
    match unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, &mask) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a real-mode guest with these instructions; `None` where there is no KVM to try it on.
    fn run(code: &'static [u8], limit: Duration) -> Option<Result<(), Unusable>> {
        let kvm = Kvm::new().ok()?;
        let thread = std::thread::spawn(move || {
            let _alarm = Alarm::set(limit).unwrap();
            let trial = Trial::new(&kvm, |memory, sregs| {
                sregs.cs.base = 0;
                sregs.cs.selector = 0;
                put(memory, CODE, code);
            });
            trial.unwrap().run("real", b"R", Instant::now() + limit)
        });
        Some(thread.join().unwrap())
    }

    #[test]
    fn a_guest_that_never_ends_is_stopped_at_the_limit() {
        let start = Instant::now();
        if let Some(result) = run(&[0xeb, 0xfe], Duration::from_millis(50)) {
            assert!(matches!(result, Err(Unusable::Slow { .. })), "{result:?}");
            assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
        }
    }

    #[test]
    fn a_guest_that_says_something_else_is_noticed() {
        if let Some(result) = run(&[0xb0, b'?', 0xe6, 0xe9, 0xf4], Duration::from_millis(50)) {
            assert!(matches!(result, Err(Unusable::Wrong { .. })), "{result:?}");
        }
    }
}
