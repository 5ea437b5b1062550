//! System calls that nothing in a container needs and that faults of the kernel were often found behind, as a filter
//! (seccomp(2)) of classic BPF.

use std::{
    fs::File,
    io::{self, Seek, Write},
    os::fd::{IntoRawFd, RawFd},
};

use libc::{
    BPF_ABS, BPF_JEQ, BPF_JMP, BPF_JSET, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO,
    sock_filter,
};

/// Fails as what is not allowed does.
const REFUSED: [libc::c_long; 42] = [
    // Keys of the base OS's user.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // Programs and faults in the kernel.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    // Mounts and namespaces.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_kcmp,
    // The computer.
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_vhangup,
];

/// Of `clone`: its flags can be looked at. Those of `clone3` cannot, and programs do without it.
const NAMESPACES: libc::c_int = libc::CLONE_NEWNS
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP;

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;
/// Calls of another width than the kernel's, on x86-64.
const X32: u32 = 0x4000_0000;

/// Where `struct seccomp_data` has things (linux/seccomp.h).
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const FIRST_ARGUMENT: u32 = 16;

/// The filter in a file that whoever is executed next inherits; its descriptor.
pub(super) fn inherited() -> io::Result<RawFd> {
    let mut file = File::from(rustix::fs::memfd_create("seccomp", rustix::fs::MemfdFlags::empty())?);
    for instruction in program() {
        file.write_all(&instruction.code.to_ne_bytes())?;
        file.write_all(&[instruction.jt, instruction.jf])?;
        file.write_all(&instruction.k.to_ne_bytes())?;
    }
    file.rewind()?;
    Ok(file.into_raw_fd())
}

/// Puts this process under the filter, which [`program`] gave. Makes one system call; privileges must be out of reach.
pub(super) fn apply(program: &mut [sock_filter]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let filter = libc::sock_fprog { len, filter: program.as_mut_ptr() };
    // SAFETY: the kernel reads the structure and the instructions, which live through the call.
    match unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The filter.
pub(super) fn program() -> Vec<sock_filter> {
    let load = |at| statement(BPF_LD | BPF_W | BPF_ABS, at);
    let answer = |with: u32| statement(BPF_RET | BPF_K, with);
    let refuse = |errno: libc::c_int| answer(SECCOMP_RET_ERRNO | errno.unsigned_abs());
    let number = |call: libc::c_long| u32::try_from(call).unwrap_or(u32::MAX);
    let mut program = vec![load(ARCH)];
    // Each test skips its answer unless it is met.
    program.extend([jump(BPF_JEQ, ARCHITECTURE, 1, 0), refuse(libc::ENOSYS), load(NUMBER)]);
    program.extend([jump(BPF_JSET, X32, 0, 1), refuse(libc::ENOSYS)]);
    for call in REFUSED {
        program.extend([jump(BPF_JEQ, number(call), 0, 1), refuse(libc::EPERM)]);
    }
    program.extend([jump(BPF_JEQ, number(libc::SYS_clone3), 0, 1), refuse(libc::ENOSYS)]);
    program.extend([jump(BPF_JEQ, number(libc::SYS_clone), 0, 3), load(FIRST_ARGUMENT)]);
    program.extend([jump(BPF_JSET, NAMESPACES.cast_unsigned(), 0, 1), refuse(libc::EPERM)]);
    program.push(answer(SECCOMP_RET_ALLOW));
    program
}

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

fn jump(test: u32, k: u32, met: u8, unmet: u8) -> sock_filter {
    sock_filter { code: (BPF_JMP | test | BPF_K) as u16, jt: met, jf: unmet, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel does with the program, for the instructions that occur.
    fn judge(arch: u32, number: u32, argument: u32) -> u32 {
        let program = program();
        let (mut at, mut value) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let code = u32::from(code);
            if code == BPF_RET | BPF_K {
                return k;
            } else if code == BPF_LD | BPF_W | BPF_ABS {
                value = match k {
                    NUMBER => number,
                    ARCH => arch,
                    FIRST_ARGUMENT => argument,
                    other => panic!("{other}"),
                };
            } else {
                let met = if code == BPF_JMP | BPF_JEQ | BPF_K { value == k } else { value & k != 0 };
                at += usize::from(if met { jt } else { jf });
            }
        }
    }

    #[test]
    fn what_services_need_passes_and_what_opens_kernels_does_not() {
        let call = |number: libc::c_long, argument| judge(ARCHITECTURE, number as u32, argument);
        let refused = |errno: libc::c_int| SECCOMP_RET_ERRNO | errno as u32;
        for number in [libc::SYS_read, libc::SYS_openat, libc::SYS_execve, libc::SYS_socket, libc::SYS_setuid] {
            assert_eq!(call(number, 0), SECCOMP_RET_ALLOW);
        }
        for number in REFUSED {
            assert_eq!(call(number, 0), refused(libc::EPERM));
        }
        assert_eq!(call(libc::SYS_clone, libc::SIGCHLD as u32), SECCOMP_RET_ALLOW);
        assert_eq!(call(libc::SYS_clone, (libc::CLONE_NEWUSER | libc::SIGCHLD) as u32), refused(libc::EPERM));
        assert_eq!(call(libc::SYS_clone3, 0), refused(libc::ENOSYS));
        assert_eq!(
            judge(0x4000_0003, libc::SYS_read as u32, 0),
            refused(libc::ENOSYS),
            "a call of another architecture"
        );
        assert_eq!(call(libc::SYS_read | libc::c_long::from(X32), 0), refused(libc::ENOSYS));
    }
}
