// Package sim runs a whole region in one goroutine and virtual time: three to
// five servers with the real rules, codec, snapshots and placement, nodes that
// run tasks, and users, while faults are thrown at all of them. Everything is
// drawn from one seed, so a run that breaks an invariant breaks it again in the
// same step when it is repeated.
//
// What is real: cluster.State and its encoded entries, Records and Restore,
// scheduler.Steps (queue, placement, retries, deployments, drains, collection).
// What is simulated: the replicated log (terms, an elected leader, entries that
// are committed by a majority's fsync), the network, disks, clocks, agents and
// users. Raft itself, gRPC and real disks are shaken elsewhere, by the chaos
// suite.
//
// What is checked: after every command that each server gives the same result,
// that a request applies once, and that compare-and-set saw what it named; from
// time to time and at the end State.Check and that states hash alike at the same
// index; on the nodes that no device has two users; and, once the faults have
// stopped, that nothing acknowledged is lost, that all work drains, and that
// nothing runs that is not wanted.
//
// Beside that, Trace replays what was asked of a real cluster through the scheduler's
// placement, to tell how much of its GPUs that allocates; and Trace.Day lets a whole day of
// such work arrive, wait, run, be preempted and go on from checkpoints, without faults, to
// tell how long it waits and what preemption costs.
package sim
