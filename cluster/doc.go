// Package cluster holds the nouns of a region (jobs, nodes, evaluations,
// allocations, deployments, models and their versions), the State they live in
// and the commands that change it.
//
// Everything here is pure and deterministic: no clock, randomness, goroutine,
// I/O or logger. Time and IDs arrive inside the commands, stamped by whoever
// proposes them, so that every replica that applies the same log holds the same
// state. There is no floating point in State or in its rules.
//
// The records carry the field names of Nomad's HTTP API
// (https://developer.hashicorp.com/nomad/api-docs), so that their JSON is what
// Nomad's clients read. Their stored form is a msgpack map with sorted keys
// and append-only names; see Marshal.
//
// Values read from a State are shared and must not be changed: Copy first.
package cluster
