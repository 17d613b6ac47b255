// Package proc starts, limits, re-attaches to and ends a process tree. It is the only package that starts a process.
//
// # The supervisor
//
// [Start] does not start the command itself: it starts a small supervisor, the same binary again with a hidden first
// argument, as leader of its own session, and the supervisor starts the command as its child. The supervisor
//
//   - survives the death of whoever called Start (unless Spec.DieWithParent says otherwise),
//   - reads the command's stdout and stderr and keeps them as bounded, rotated files, so logs flow while nobody watches,
//   - adopts every orphan of the command (child subreaper), kills what is left when the command ends (unless
//     Spec.LeaveOrphans says otherwise), and
//   - writes the exit status to Spec.StatusFile, atomically and synced, so that a successor can read it.
//
// A program that uses Start must call [Main] first thing in main (and in TestMain): in a supervisor it never returns.
//
// # Identity
//
// [Identity] names a running tree by pid, start time and boot id, so a reused pid is never mistaken for it. [Attach] turns
// it back into a [Process]; when the supervisor is gone it answers [ErrGone] and [Collect] reads the exit status it left.
// A supervisor that was itself killed leaves none: the command is killed with it and the status says Lost. [Find] recovers
// the identity from the status file's name, for a starter that died before it could keep it.
//
// # Limits, containment, isolation
//
// Limits need cgroup v2 with the memory and cpu controllers and a parent group that may be written; [Probe] tries and says
// in words why not. A cgroup v2 tree without controllers (hybrid hosts) still contains and kills the tree as a whole.
// Without any cgroup the tree is found by parentage, which is complete as long as the supervisor lives. Spec.Cgroup is
// created with two children: "task" carries the limits, "shim" holds the supervisor, which is charged to neither.
//
// Isolation gives the command its own pid, mount and ipc namespaces: the host's files are visible but read-only, /tmp,
// /var/tmp and /dev/shm are private and bounded, named directories are writable or hidden, other processes are invisible,
// the user is "nobody" unless named, and no privilege can be gained by set-uid programs. What it does not isolate: the
// kernel, the network (unless Spec.NoNetwork), device nodes, and readable files of the host that are not hidden.
//
// # Cost
//
// A supervisor is one idle process of six to eight threads. Measured on x86-64: 1 MiB of memory of its own from a small
// binary and 2.6 MiB from one of 24 MB with gRPC, Raft and HCL in it (beside 5 and 17 MiB of the binary's pages, which all
// supervisors and the starter share), and 10 to 20 ms of start-up, most of it the binary's own initialisation.
//
// Linux 5.14 or newer (pidfd, clone3 into a cgroup, cgroup.kill, mount_setattr).
package proc
