// Package swarm plays nodes: many agents in one process, over the real streams,
// with no host behind them. Each registers with plausible resources, sends
// heartbeats, takes allocations and reports them running after a while, batch work
// complete after another. It loads a control plane as real nodes would, at little
// cost: many nodes share one connection.
//
// What a node of the swarm runs is kept in memory, across its sessions: it reports
// again what was not acknowledged, as agents do, and when it is told to stop an
// allocation it does. It serves no model and answers calls with a refusal. It watches
// its devices: one that is given to two allocations at once is a conflict, which is kept.
package swarm
