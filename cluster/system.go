package cluster

import (
	"bytes"
	"path"
)

// PerNode says whether the job has an allocation of each group on every node that may
// run it, instead of a count.
func (j *Job) PerNode() bool { return j.Type == JobTypeSystem || j.Type == JobTypeSysBatch }

// Finite says whether the job's work is to end by itself.
func (j *Job) Finite() bool { return j.Type == JobTypeBatch || j.Type == JobTypeSysBatch }

// Covers says whether a node is in the job's datacenters and node pool.
func (j *Job) Covers(n *Node) bool {
	return n.InPool(j.NodePool) && InDatacenters(j.Datacenters, n.Datacenter)
}

// InDatacenters matches a datacenter against a job's globs.
func InDatacenters(globs []string, datacenter string) bool {
	for _, g := range globs {
		if ok, err := path.Match(g, datacenter); g == datacenter || (err == nil && ok) {
			return true
		}
	}
	return false
}

// InPool says whether a job of that node pool may use the node; "" is the default pool.
func (n *Node) InPool(pool string) bool {
	return pool == NodePoolAll || poolOr(pool) == poolOr(n.NodePool)
}

func poolOr(name string) string {
	if name == "" {
		return DefaultNodePool
	}
	return name
}

// PerNodeJobs returns the jobs that are to run on every node that may run them, by namespace and ID.
func (s *Snapshot) PerNodeJobs(ws WatchSet) []*Job {
	return list[Job](s.txn, ws, TableJobs, "pernode_prefix", "")
}

// evalSystem evaluates the system jobs that cover one of the nodes, which have come or
// take work again. Each is evaluated once, however many nodes there are. One that waits
// for room looks at all nodes again in any case. Of two that are to be answered the later
// one may be used, as if it were new: so it answers for what the earlier one, which may
// be under way, does not see, and ten thousand nodes that come one by one leave two
// open evaluations of a job.
func (t *tx) evalSystem(nodes []*Node) {
	if t.stamp.Rules < rulesEngine || len(nodes) == 0 {
		return
	}
	var keys []JobKey
	for _, j := range t.PerNodeJobs(nil) {
		for _, n := range nodes {
			if n.Ready() && j.Covers(n) {
				if !t.reuseEval(j) {
					keys = append(keys, j.Key())
				}
				break
			}
		}
	}
	n := nodes[0]
	t.evalJobs(keys, TriggerNodeUpdate, func(e *Evaluation) {
		e.NodeID, e.NodeModifyIndex = n.ID, t.index
	})
}

// reuseEval says whether the open evaluations of a job will see what the command has
// changed, and sees to it where there are two.
func (t *tx) reuseEval(j *Job) bool {
	var first, last *Evaluation
	for _, e := range t.OpenEvalsByJob(j.Key()) {
		switch {
		case e.Status == EvalStatusBlocked, e.CreateIndex == t.index:
			return true
		case !e.Answerable() || e.Priority != j.Priority:
		case last == nil || e.CreateIndex >= last.CreateIndex:
			first, last = last, e
		case first == nil || e.CreateIndex > first.CreateIndex:
			first = e
		}
	}
	if first == nil {
		return false
	}
	again := *last
	t.putEvals([]*Evaluation{&again})
	return true
}

// alike says whether a node that has registered again is what it was, as far as work is
// chosen by it.
func alike(old, n *Node) bool {
	plain := func(n *Node) []byte {
		c := *n
		c.Events, c.Status, c.StatusDescription, c.StatusUpdatedAt, c.Revision = nil, "", "", 0, 0
		c.CreateIndex, c.ModifyIndex = 0, 0
		return Marshal(&c)
	}
	return bytes.Equal(plain(old), plain(n))
}
