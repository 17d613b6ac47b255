// Package agent is the node daemon: it owns one host, its GPUs and the
// allocations that the servers want there.
//
// An Agent keeps one outbound stream to any server (package fleet/pb), over which
// it learns what it shall run, says how that goes, and answers questions (logs,
// files, statistics, a model check). It needs no inbound port for control.
//
// What it shall run and what it runs is kept in DATA/state.db. With all servers
// down the agent goes on and also starts from there; after its own death, by
// whatever means, the next agent takes the running tasks over and learns how the
// others ended. See DESIGN.md.
package agent
