package fleet

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// absentGrace is what a node gets on top of a TTL that no server has heard of
// since this one leads: after a halt of all servers its next attempt may be a
// while away.
const absentGrace = 8 * time.Second

// view is what another server said of the nodes that it holds.
type view struct {
	reported time.Time // its newest report
	held     map[string]time.Time
	gone     map[string]time.Time
}

// heldAt is when a node of the view was last heard of. A server that has gone
// quiet, for which quiet is the measure, may have heard of its nodes since: they
// get the time to find that out and go elsewhere.
func (v *view) heldAt(heard, now time.Time, ttl time.Duration) time.Time {
	if now.Sub(v.reported) > ttl/4 && v.reported.Sub(heard) <= ttl/2 {
		return v.reported.Add(ttl / 4)
	}
	return heard
}

// lastHeard is when a node was last heard of by any server; false when none knows
// of it. Hold mu.
func (s *Server) lastHeard(id string, now time.Time, ttl time.Duration) (at time.Time, known bool) {
	newest := func(t time.Time) {
		if !known || t.After(at) {
			at, known = t, true
		}
	}
	if sess := s.sessions[id]; sess != nil {
		newest(s.heard(sess, now))
	} else if t, ok := s.gone[id]; ok {
		newest(t)
	}
	if known {
		newest(s.awake)
	}
	for _, v := range s.views {
		if t, ok := v.held[id]; ok {
			newest(v.heldAt(t, now, ttl))
		} else if t, ok := v.gone[id]; ok {
			newest(t)
		}
	}
	return at, known
}

// forgetGone drops old words of nodes that do not count as there. Hold mu.
func (s *Server) forgetGone(nodes []*cluster.Node, now time.Time, ttl time.Duration) {
	there := make(map[string]bool, len(nodes))
	for _, n := range nodes {
		there[n.ID] = true
	}
	drop := func(heard map[string]time.Time) {
		for id, t := range heard {
			if !there[id] && now.Sub(t) > 3*ttl {
				delete(heard, id)
			}
		}
	}
	drop(s.gone)
	for _, v := range s.views {
		drop(v.gone)
		drop(v.held)
	}
}

// judge decides, on the leader, which nodes count as down.
type judge struct {
	server *Server
	ttl    time.Duration // by which nodes are judged: never less than what any was told lately
	shrunk time.Time     // when nodes were told a smaller one

	leads    bool
	since    time.Time            // of leading
	absent   map[string]time.Time // when it was first seen that nobody knows of a node
	fell     map[string]time.Time // nodes that fell silent within the last TTL
	holdSeen time.Time            // when this leader first saw the hold
	calm     time.Time            // since when enough nodes are back, zero: they are not
}

// census is one look at all nodes.
type census struct {
	ready  int             // that count as there
	quiet  int             // … of them, not heard for half a TTL
	silent []*cluster.Node // … of them, not heard for a TTL
	lost   int             // that are disconnected
	out    []*cluster.Node // … of them, not heard for a TTL
}

// look is one round: the TTL follows the number of nodes; a leader then marks who
// is silent.
func (j *judge) look(ctx context.Context, now time.Time) {
	s := j.server
	snap := s.cfg.Store.State().Snapshot()
	nodes := snap.Nodes(nil, "")
	nodes = slices.DeleteFunc(nodes, func(n *cluster.Node) bool { return n.Status == cluster.NodeStatusDown })
	j.adapt(len(nodes), now)
	s.mu.Lock()
	s.forgetGone(nodes, now, j.ttl)
	s.mu.Unlock()
	if !s.cfg.Store.IsLeader() {
		j.leads = false
		return
	}
	if !j.leads {
		j.leads, j.since, j.holdSeen, j.calm = true, now, time.Time{}, time.Time{}
		clear(j.absent)
		clear(j.fell)
	}
	c := j.count(nodes, now)
	ctx, cancel := context.WithTimeout(ctx, j.ttl/3) // a slow log must not look like a server that stood still
	defer cancel()
	hold := snap.FleetHold(nil)
	if hold == nil {
		j.holdSeen = time.Time{}
		var err error
		if hold, err = j.pause(ctx, c); err != nil {
			s.log.Warn("replacements could not be paused", "error", err)
			return // nobody goes down before the hold is stored
		}
	} else if j.release(ctx, c, hold, now) {
		hold = nil
	}
	if hold == nil { // who may still come back by the rules of what runs there stays disconnected
		c.out = slices.DeleteFunc(c.out, func(n *cluster.Node) bool { return snap.Awaited(n, cluster.TimeOf(time.Now())) })
	}
	j.mark(ctx, c, hold, now)
}

// adapt tells nodes a TTL that grows with their number, and judges by the longer
// one while some may not have heard of a shorter.
func (j *judge) adapt(nodes int, now time.Time) {
	s := j.server
	want := s.cfg.TTL
	if by := time.Duration(nodes) * time.Second / time.Duration(s.cfg.Rate); by > want {
		want = (by + time.Second - 1).Truncate(time.Second)
	}
	if told := s.TTL(); want != told {
		s.ttl.Store(int64(want))
		if want < told {
			j.shrunk = now
		}
		s.mu.Lock()
		for _, sess := range s.sessions {
			sess.retell()
		}
		s.mu.Unlock()
	}
	if want >= j.ttl || now.Sub(j.shrunk) > j.ttl {
		j.ttl = want
	}
}

// count looks when each node was last heard of.
func (j *judge) count(nodes []*cluster.Node, now time.Time) census {
	s := j.server
	var c census
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, t := range j.fell {
		if now.Sub(t) > j.ttl {
			delete(j.fell, id)
		}
	}
	silences := make([]time.Duration, len(nodes))
	var ready []time.Duration
	for i, n := range nodes {
		heard, known := s.lastHeard(n.ID, now, j.ttl)
		if known {
			delete(j.absent, n.ID)
		} else {
			first, seen := j.absent[n.ID]
			if !seen {
				first = now
				j.absent[n.ID] = now
			}
			heard = first.Add(absentGrace)
		}
		if start := j.since.Add(-j.ttl / 2); heard.Before(start) {
			heard = start // a fresh leader gives the others' reports half a TTL to come
		}
		silences[i] = now.Sub(heard)
		if n.Status != cluster.NodeStatusDisconnected {
			ready = append(ready, silences[i])
		}
	}
	limit := silenceLimit(ready, j.ttl)
	for i, n := range nodes {
		switch silence := silences[i]; {
		case n.Status == cluster.NodeStatusDisconnected:
			c.lost++
			if silence > limit {
				c.out = append(c.out, n)
			}
			continue
		case silence > limit:
			c.silent = append(c.silent, n)
			c.quiet++
		case silence > limit/2:
			c.quiet++
		}
		c.ready++
		delete(j.fell, n.ID)
	}
	return c
}

// Late heartbeats.
const (
	medianNodes = 8 // fewer say nothing about all
	maxSilence  = 3 // TTLs
)

// silenceLimit is how long a node may be silent when those that count as there have been
// silent for so long: a TTL; longer when more than half of them are later than a
// heartbeat (a quarter of the TTL), since then it is not the nodes, but servers or
// network have too much to do. When half are silent for a whole TTL they are gone. It
// sorts silences.
func silenceLimit(silences []time.Duration, ttl time.Duration) time.Duration {
	if len(silences) < medianNodes {
		return ttl
	}
	slices.Sort(silences)
	median := silences[len(silences)/2]
	if median > ttl {
		return ttl
	}
	return min(max(ttl, 4*median), maxSilence*ttl)
}

// many says whether so many of some nodes are silent that replacements pause.
func (j *judge) many(silent, of int) bool {
	return silent >= j.server.cfg.HoldNodes && silent*100 > j.server.cfg.HoldShare*of
}

// pause stops replacements when too many nodes fell silent within one TTL. Who is
// only quiet counts as well: nodes that went together do not fall silent at one
// moment, since their last words were not at one moment.
func (j *judge) pause(ctx context.Context, c census) (*cluster.FleetHold, error) {
	silent, of := c.quiet+len(j.fell), c.ready+len(j.fell)
	if len(c.silent) == 0 || !j.many(silent, of) {
		return nil, nil
	}
	hold := &cluster.FleetHold{Nodes: silent, Of: of, Reason: fmt.Sprintf(
		"%d of %d nodes fell silent within %s: more likely the network than the nodes; replacements pause until they are back, an operator lets go, or %s have passed",
		silent, of, j.ttl, j.server.cfg.HoldLimit)}
	if _, err := j.server.cfg.Store.Apply(ctx, &cluster.SetFleetHold{Hold: hold}); err != nil {
		return nil, err
	}
	j.server.log.Error("many nodes are silent: replacements pause", "silent", silent, "of", of, "ttl", j.ttl)
	return hold, nil
}

// release ends the pause when enough nodes are back for a TTL, or it lasts too long.
func (j *judge) release(ctx context.Context, c census, hold *cluster.FleetHold, now time.Time) bool {
	if j.holdSeen.IsZero() {
		j.holdSeen = now
	}
	why := ""
	silent := c.lost + c.quiet
	if j.many(silent, c.lost+c.ready) {
		j.calm = time.Time{}
	} else if j.calm.IsZero() {
		j.calm = now
	} else if now.Sub(j.calm) > j.ttl {
		why = "enough nodes are back"
	}
	if now.Sub(j.holdSeen) > j.server.cfg.HoldLimit {
		why = "the longest pause is over"
	}
	if why == "" {
		return false
	}
	if err := j.server.ReleaseHold(ctx); err != nil {
		j.server.log.Warn("the pause of replacements could not be ended", "error", err)
		return false
	}
	j.server.log.Warn("replacements go on", "reason", why, "silent", silent, "since", hold.Since.Std())
	return true
}

// ReleaseHold lets replacements go on although many nodes are silent: those then
// count as down. Any server takes it. Without a hold it does nothing.
func (s *Server) ReleaseHold(ctx context.Context) error {
	_, err := s.cfg.Store.Apply(ctx, &cluster.SetFleetHold{})
	return err
}

// mark writes the status of silent nodes.
func (j *judge) mark(ctx context.Context, c census, hold *cluster.FleetHold, now time.Time) {
	s := j.server
	var updates []cluster.NodeStatusUpdate
	for _, n := range c.silent {
		u := cluster.NodeStatusUpdate{NodeID: n.ID, Index: n.ModifyIndex, Status: cluster.NodeStatusDown, Message: "Node heartbeat missed"}
		if hold != nil {
			u.Status, u.Message = cluster.NodeStatusDisconnected, "Node heartbeat missed; replacements pause: "+hold.Reason
		}
		updates = append(updates, u)
	}
	if hold == nil {
		for _, n := range c.out {
			updates = append(updates, cluster.NodeStatusUpdate{
				NodeID: n.ID, Index: n.ModifyIndex, Status: cluster.NodeStatusDown, Message: "Node did not come back",
			})
		}
	}
	logged := 0
	for len(updates) > 0 {
		batch := updates[:s.sweep(updates)]
		updates = updates[len(batch):]
		if _, err := s.cfg.Store.Apply(ctx, &cluster.UpdateNodeStatus{Updates: batch}); err != nil {
			s.log.Warn("silent nodes could not be marked; they will be at the next look", "count", len(batch)+len(updates), "error", err)
			break
		}
		for _, u := range batch {
			s.metrics.silenced.WithLabelValues(u.Status).Inc()
			if u.Status == cluster.NodeStatusDown {
				j.fell[u.NodeID] = now
			}
			if logged++; logged <= loggedNodes {
				s.log.Warn("node is silent", "node", u.NodeID, "status", u.Status, "ttl", j.ttl)
			}
		}
	}
	if more := logged - loggedNodes; more > 0 {
		s.log.Warn("more nodes are silent", "count", more)
	}
}

// sweep is how many of the nodes change their status in one log entry: few enough that
// applying it, which looks at all that they run, does not hold up others for long.
func (s *Server) sweep(updates []cluster.NodeStatusUpdate) int {
	snap, allocs := s.cfg.Store.State().Snapshot(), 0
	for i, u := range updates {
		if allocs += len(snap.AllocsByNode(nil, u.NodeID)); i > 0 && allocs > sweepAllocs {
			return i
		}
	}
	return len(updates)
}

// loggedNodes bounds how many silent nodes of one look are named in the log.
const loggedNodes = 20
