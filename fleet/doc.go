// Package fleet is the servers' side of the wire to agents and gateways: node
// sessions and their time to live, the stream of desired state, batches of
// status, watches of routes, and reverse calls (logs, files, statistics, model
// checks) over streams that the nodes themselves opened.
//
// Nodes dial out, to any server, and need no inbound port. A session belongs to the
// server that holds it; nothing of it is replicated but what it leads to: node
// records, node status and what allocations report.
//
// # Who is there
//
// A node says something at least every quarter of the TTL. The TTL is DefaultTTL and
// grows with the region, by a second for each DefaultRate nodes, so that heartbeats
// stay a bounded load; nodes hear of a change at once. Each server tells each other
// one, every tenth of a TTL and at once when a session begins or ends, which nodes
// it holds and how long ago it heard of them: ages, so that no two clocks need to
// agree, on a clock that does not jump. Everybody tells everybody, because whoever
// leads next then knows already, and because any server can find any node.
//
// Only the leader judges (judge, in liveness.go). It compares with what any server
// said last, so a node that moves is never silent. It counts a node as down that
// nobody heard for a TTL, with these graces, each for a case that is not the node's
// fault:
//
//   - A server that has gone quiet may have heard of its nodes since. They get a
//     quarter of a TTL more from its last report: they find out within half a TTL,
//     since heartbeats are answered, and seek another server at once. So a node that
//     dies together with the server that held it is noticed within 1.25 TTL.
//   - A fresh leader gives half a TTL to the reports of the others.
//   - A server that stood still (a paused process) begins to count anew, and so does
//     what it tells others of its nodes. One that is late (an overloaded machine, seen
//     by its own timers) reads heartbeats as late, and adds that.
//   - When more than half of all nodes are later than a heartbeat, it is not the nodes:
//     all get as many times longer, at most three TTLs (silenceLimit).
//   - A node of which nobody knows, after all servers were away, gets absentGrace:
//     agents back off for up to 5 s.
//
// A server that hears nothing of the leader, or, while nobody leads, of any other
// server, is cut off: it sends its nodes away and takes only such as have tried
// every server. When it is alone they so stay with it, and calls are answered. A
// leader that the log hears of but that does not answer is only slow, and gets a whole
// TTL instead of half of one.
//
// A server that holds many more nodes than its share, as after another one was away,
// sends some to the others, a few each beat.
//
// # Many at once
//
// When more than DefaultHoldShare percent of the nodes fall silent within a TTL, the
// fault is more likely between them and the servers than in them. The leader first
// sets a hold, a record of the state (cluster.FleetHold), then marks them
// disconnected, not down: the scheduler replaces nothing of what is on disconnected
// nodes while it stands, and routes to it stay until gateways see it fail. Since
// nodes that went together did not speak last at one moment, those that are quiet for
// half a TTL count as well once the first is silent. The hold ends when enough nodes
// have been back for a TTL, by an operator (rxvision node hold release), or after DefaultHoldLimit;
// who is still silent then counts as down.
//
// # What a session promises
//
// A node is ready in the state before it is told what to run, and a node that comes
// again as it was costs no log entry: thousands may move from a dead server. What it
// is told first is no older than what any server told it before: the
// session waits until this server has caught up with the leader (ReadIndex), or a node
// that moves to a lagging server would end what that does not know yet. It is told
// what differs from what its hello says that it knows, since a server's death would
// else have a thousand nodes told a thousand allocations each; and everything when it
// knows nothing, or knows it of another timeline (a restore begins one: there the
// node must say again what was lost). From then on
// it gets differences. While nobody leads, sessions wait instead of ending.
//
// A node that was counted as silent but is heard on its stream is registered again
// there: a servers' mistake, such as under too much load, must not make more of it.
//
// Status is acknowledged when it is in the log. It is never dropped because this
// server does not know the allocation yet: the rules, which run in the order of the
// log, ignore what is not the node's own. While the log takes nothing, reports wait;
// they never hold up the reading of heartbeats. A report that was on its way when its
// session broke is dropped before it is proposed, since the node reports again
// elsewhere; one that was just being proposed may still land after a newer one. So
// may a registration. Agents number what they say (cluster.Revision), and the rules drop
// what is older than what they know. A state that knows less of a node than it said
// here, since it was restored, has the node register again.
//
// Calls go to the server that holds the node, and artifacts come from one that has
// stored them, over the servers' own network (PeerNet), which authenticates both
// ends.
//
// # Routes
//
// A server works routes out once per change for all its gateways, and shares between
// versions of the table what did not change: a model's message is the same object
// while nothing of it changes, so a gateway's difference is a comparison of pointers
// and a version is marshalled once. Large updates come in parts that gateways take
// over as one.
package fleet
