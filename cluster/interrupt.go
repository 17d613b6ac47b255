package cluster

import "time"

// AttrSpot is the attribute of nodes that their owner may take away at short notice:
// "true" there. Only work that allows it is placed on them, see MetaSpot.
const AttrSpot = "rx.spot"

// MetaSpot is the meta key, of a group or, for all of its groups, of a job, that says
// whether work may go to spot nodes. Without it, work never does.
const MetaSpot = "rx_spot"

// The values of MetaSpot.
const (
	SpotNever   = "never"
	SpotAllow   = "allow"
	SpotRequire = "require"
)

// Spot is the group's MetaSpot, SpotNever when nothing is said.
func (j *Job) Spot(g *TaskGroup) string {
	for _, meta := range []map[string]string{g.Meta, j.Meta} {
		if v := meta[MetaSpot]; v != "" {
			return v
		}
	}
	return SpotNever
}

// Interruption is the notice that a node will be taken away. The agent hears of it from
// the provider of its machine. The rules drain the node for each new one.
type Interruption struct {
	Reason string
	At     Time // when the node goes, 0: that is not known, and not certain
}

// InterruptedBy is the key in the meta of a drain that a notice has begun; the reason is its value.
const InterruptedBy = "rx_interruption"

// interrupt drains a node that will be taken away. What runs there must be gone by
// half of the time that is left, so that the other half is for tasks to end in.
func (t *tx) interrupt(n *Node, reason string, at Time, meta map[string]string) {
	now := Time(t.stamp.Time)
	s := &DrainStrategy{StartedAt: now}
	if at != 0 {
		s.Interrupted = true
		s.Deadline = max(time.Duration(at-now)/2, 1)
		s.ForceDeadline = now.Add(s.Deadline)
	}
	if meta == nil {
		meta = map[string]string{InterruptedBy: reason}
	}
	n.Drain, n.DrainStrategy, n.SchedulingEligibility = true, s, NodeIneligible
	n.LastDrain = &DrainMetadata{StartedAt: now, UpdatedAt: now, Status: "draining", Meta: meta}
	details := map[string]string{"reason": reason}
	if at != 0 {
		details["at"] = at.Std().UTC().Format(time.RFC3339)
	}
	t.nodeEvent(n, "Node is to be interrupted: "+reason, details)
}

// heed acts on a change of what the agent says of interruptions of its node, and tells
// whether the node's jobs must be evaluated. A notice that is withdrawn, as by the machine's
// next start, ends the drain that it began.
func (t *tx) heed(old, n *Node) (drained bool) {
	was, is := old.Interruption, n.Interruption
	switch {
	case is != nil && (was == nil || *was != *is):
		t.interrupt(n, is.Reason, is.At, nil)
		return true
	case is != nil || was == nil || n.LastDrain == nil || n.LastDrain.Meta[InterruptedBy] == "":
		return false // nothing new, or an operator's drain came after it
	}
	n.SchedulingEligibility = NodeEligible
	if n.Drain {
		n.Drain, n.DrainStrategy = false, nil
		last := *n.LastDrain
		last.Status, last.UpdatedAt = "canceled", Time(t.stamp.Time)
		n.LastDrain = &last
	}
	t.nodeEvent(n, "The notice of an interruption is withdrawn", nil)
	return true
}
