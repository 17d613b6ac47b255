// Package fleet is the servers' side of the wire to agents and gateways: node
// sessions and their time to live, the stream of desired state, batches of
// status, watches of routes, and reverse calls (logs, files, statistics, model
// checks) over streams that the nodes themselves opened.
//
// Nodes dial out and need no inbound port. A session belongs to the server that
// holds it; nothing of it is replicated but what it leads to: node records, node
// status and what allocations report.
package fleet
