package scheduler

import (
	"cmp"
	"slices"
	"time"

	"github.com/rxvision/rxvision/cluster"
)

// Retention says when ended records are forgotten. By age: the names are those of
// Nomad's server settings (https://developer.hashicorp.com/nomad/docs/configuration/server),
// a zero value takes Nomad's default. And by count, so that no burst fills the memory:
// beyond a bound the oldest leave before their time. What lives, what placement
// must know, the newest failure of each group and what a model's lineage names (its
// job with that version, allocation and evaluation) stay whatever their age.
type Retention struct {
	JobGCInterval         time.Duration // between two collections; 5 min
	JobGCThreshold        time.Duration // stopped jobs, and batch jobs that are done, with all that is theirs; 4 h
	EvalGCThreshold       time.Duration // evaluations and their allocations, after they ended; 1 h
	BatchEvalGCThreshold  time.Duration // the same of batch jobs; 24 h
	DeploymentGCThreshold time.Duration // 1 h
	NodeGCThreshold       time.Duration // nodes that are down and hold nothing, and then their enrolments; 24 h
	JobTrackedVersions    int           // versions of a job, besides the newest stable one and those that run; 6, which is the most

	MaxEndedJobs        int // 100,000: the jobs that leave after JobGCThreshold
	MaxEndedAllocsOfJob int // 1,000
	MaxEndedAllocs      int // 100,000
	MaxEndedEvals       int // 100,000
	MaxEndedDeployments int // 100,000
}

func (r *Retention) defaults() {
	for _, d := range []struct {
		value *time.Duration
		unset time.Duration
	}{
		{&r.JobGCInterval, 5 * time.Minute},
		{&r.JobGCThreshold, 4 * time.Hour},
		{&r.EvalGCThreshold, time.Hour},
		{&r.BatchEvalGCThreshold, 24 * time.Hour},
		{&r.DeploymentGCThreshold, time.Hour},
		{&r.NodeGCThreshold, 24 * time.Hour},
	} {
		*d.value = cmp.Or(*d.value, d.unset)
	}
	if r.JobTrackedVersions <= 0 || r.JobTrackedVersions > cluster.MaxJobVersions {
		r.JobTrackedVersions = cluster.MaxJobVersions
	}
	r.MaxEndedJobs = cmp.Or(r.MaxEndedJobs, 100_000)
	r.MaxEndedAllocsOfJob = cmp.Or(r.MaxEndedAllocsOfJob, 1_000)
	r.MaxEndedAllocs = cmp.Or(r.MaxEndedAllocs, 100_000)
	r.MaxEndedEvals = cmp.Or(r.MaxEndedEvals, 100_000)
	r.MaxEndedDeployments = cmp.Or(r.MaxEndedDeployments, 100_000)
}

// Bounds of collection.
const (
	reapRecords = 500 // that one command forgets: some milliseconds of all servers
	reapBytes   = 64 << 10
	pageRecords = 4_000 // looked at on one snapshot, a whole job at least
	maxTokens   = 500   // expired ones, of each kind, that a collection forgets
	ageBuckets  = 1_000
)

// collector walks the state job by job, a page at a time, and says what may be
// forgotten. It holds no more than where it is and how old is what it saw.
type collector struct {
	keep   *Retention
	forced bool // thresholds do not count
	after  cluster.JobKey
	cmds   []cluster.Command
	reap   *cluster.Reap
	room   int // records that reap still takes
	bytes  int

	jobs, allocs, evals, deployments ages
}

func newCollector(keep *Retention) *collector {
	width := max(keep.EvalGCThreshold, keep.BatchEvalGCThreshold, keep.JobGCThreshold)/ageBuckets + time.Second
	return &collector{keep: keep, jobs: newAges(width), allocs: newAges(width), evals: newAges(width), deployments: newAges(width)}
}

// page goes on with the walk on a snapshot: what to commit, and whether the walk
// is through. Then the next page begins another.
func (c *collector) page(snap *cluster.Snapshot, now cluster.Time) (cmds []cluster.Command, done bool) {
	for looked := 0; looked < pageRecords; looked++ {
		k, ok := snap.NextJobKey(c.after)
		if !ok {
			done = true
			break
		}
		c.after = k
		looked += c.job(snap, k, now)
	}
	if done {
		c.nodes(snap, now)
		c.enrolments(snap, now)
		c.tokens(snap, now)
		c.after = cluster.JobKey{}
		c.jobs.turn(c.keep.MaxEndedJobs)
		c.allocs.turn(c.keep.MaxEndedAllocs)
		c.evals.turn(c.keep.MaxEndedEvals)
		c.deployments.turn(c.keep.MaxEndedDeployments)
	}
	cmds, c.cmds, c.reap = c.cmds, nil, nil
	return cmds, done
}

// next gives the command that takes one more record of so many bytes.
func (c *collector) next(size int) *cluster.Reap {
	if c.reap == nil || c.room == 0 || c.bytes+size > reapBytes {
		c.reap, c.room, c.bytes = &cluster.Reap{}, reapRecords, 0
		c.cmds = append(c.cmds, c.reap)
	}
	c.room--
	c.bytes += size
	return c.reap
}

func (c *collector) old(modified int64, keep time.Duration, now cluster.Time) bool {
	return c.forced || cluster.Time(modified).Add(keep) <= now
}

// job looks at all that belongs to one job, or is left of it, and says how much
// that was.
func (c *collector) job(snap *cluster.Snapshot, k cluster.JobKey, now cluster.Time) (looked int) {
	j := snap.Job(nil, k)
	allocs := snap.AllocsByJob(nil, k)
	evals, deployments := snap.EndedEvals(k), snap.EndedDeployments(k)
	looked = len(allocs) + len(evals) + len(deployments)
	named := snap.Lineage(k)
	if j != nil && named == nil && len(snap.OpenEvalsByJob(k)) == 0 {
		if end, dead := endOf(j, allocs, evals); dead && (c.old(end, c.keep.JobGCThreshold, now) || c.jobs.over(end)) {
			r := c.next(len(k.Namespace) + len(k.ID))
			r.Jobs = append(r.Jobs, k)
			c.room -= min(c.room, looked) // they leave in the same entry
			return looked
		} else if dead {
			c.jobs.add(end)
		}
	}
	threshold := c.keep.EvalGCThreshold
	if j != nil && j.Finite() {
		threshold = c.keep.BatchEvalGCThreshold
	}
	needed := c.ended(allocs, j, named, goneNodes(snap, j, allocs), threshold, now)
	for _, e := range evals {
		switch {
		case needed[e.ID] || named.Eval(e.ID):
		case c.old(e.At, threshold, now) || c.evals.over(e.At):
			r := c.next(len(e.ID))
			r.Evals = append(r.Evals, e.ID)
		default:
			c.evals.add(e.At)
		}
	}
	latest := "" // of a job that is there it stays
	if j != nil && len(deployments) > 0 {
		latest = snap.LatestDeployment(nil, k).ID
	}
	for _, d := range deployments {
		switch {
		case d.ID == latest:
		case c.old(d.At, c.keep.DeploymentGCThreshold, now) || c.deployments.over(d.At):
			r := c.next(len(d.ID))
			r.Deployments = append(r.Deployments, d.ID)
		default:
			c.deployments.add(d.At)
		}
	}
	c.versions(snap, k, j, named, allocs)
	return looked
}

// endOf says whether a job of which no evaluation is open has ended for good, and when.
func endOf(j *cluster.Job, allocs []*cluster.Allocation, evals []cluster.Ended) (last int64, dead bool) {
	if j.Status != cluster.JobStatusDead || (!j.Stop && !j.Finite()) {
		return 0, false
	}
	last = j.SubmitTime
	for _, e := range evals {
		last = max(last, e.At)
	}
	for _, a := range allocs {
		if !a.ClientTerminal() {
			return 0, false
		}
		last = max(last, a.ModifyTime)
	}
	return last, true
}

// goneNodes are the nodes of a system job's allocations that are not there any more: what
// was done there says nothing about others.
func goneNodes(snap *cluster.Snapshot, j *cluster.Job, allocs []*cluster.Allocation) map[string]bool {
	gone := map[string]bool{}
	if j == nil || !j.PerNode() {
		return gone
	}
	for _, a := range allocs {
		if a.ClientTerminal() && snap.Node(nil, a.NodeID) == nil {
			gone[a.NodeID] = true
		}
	}
	return gone
}

// ended forgets allocations that no longer count for their job (nil: purged), or were on
// nodes that are gone, and gives the evaluations of those that stay.
func (c *collector) ended(allocs []*cluster.Allocation, j *cluster.Job, named *cluster.Lineage, gone map[string]bool, threshold time.Duration, now cluster.Time) (needed map[string]bool) {
	needed = map[string]bool{}
	failures := newestFailures(allocs, j)
	var over []*cluster.Allocation
	for _, a := range allocs {
		if (spent(a, j) || gone[a.NodeID] && a.ClientTerminal()) && a != failures[a.TaskGroup] && !named.Alloc(a.ID) {
			over = append(over, a)
		} else {
			needed[a.EvalID] = true
		}
	}
	if len(over) > c.keep.MaxEndedAllocsOfJob { // the newest stay
		slices.SortFunc(over, func(a, b *cluster.Allocation) int {
			return cmp.Or(cmp.Compare(b.ModifyTime, a.ModifyTime), cmp.Compare(a.ID, b.ID))
		})
	}
	for i, a := range over {
		if i >= c.keep.MaxEndedAllocsOfJob || c.old(a.ModifyTime, threshold, now) || c.allocs.over(a.ModifyTime) {
			r := c.next(len(a.ID))
			r.Allocs = append(r.Allocs, a.ID)
			continue
		}
		c.allocs.add(a.ModifyTime)
		needed[a.EvalID] = true
	}
	return needed
}

// newestFailures gives the allocation of each group that failed last: what an
// operator asks for first.
func newestFailures(allocs []*cluster.Allocation, j *cluster.Job) map[string]*cluster.Allocation {
	newest := map[string]*cluster.Allocation{}
	for _, a := range allocs {
		if j == nil || a.ClientStatus != cluster.AllocClientFailed || a.JobCreateIndex != j.CreateIndex {
			continue
		}
		if old := newest[a.TaskGroup]; old == nil || old.ModifyTime < a.ModifyTime ||
			(old.ModifyTime == a.ModifyTime && old.CreateIndex < a.CreateIndex) {
			newest[a.TaskGroup] = a
		}
	}
	return newest
}

// spent says whether an allocation no longer counts for its job (nil: purged).
// What placement still needs to know is not: batch work that is done, a failed
// allocation that holds its name.
func spent(a *cluster.Allocation, j *cluster.Job) bool {
	switch {
	case !a.ClientTerminal():
		return false
	case j == nil || j.CreateIndex != a.JobCreateIndex:
		return true
	case j.Finite():
		return a.JobVersion < j.Version || a.NextAllocation != ""
	}
	return a.ServerTerminal() || a.NextAllocation != "" || a.ClientStatus != cluster.AllocClientFailed
}

// versions forgets those that are neither among the newest, nor the newest
// stable one, nor run, nor made a model.
func (c *collector) versions(snap *cluster.Snapshot, k cluster.JobKey, j *cluster.Job, named *cluster.Lineage, allocs []*cluster.Allocation) {
	versions := snap.JobVersions(nil, k) // newest first
	if j != nil && len(versions) <= c.keep.JobTrackedVersions {
		return
	}
	used := map[uint64]bool{}
	for _, a := range allocs {
		used[a.JobVersion] = used[a.JobVersion] || a.Occupies()
	}
	stable := false
	for i, v := range versions {
		newestStable := v.Stable && !stable
		stable = stable || v.Stable
		if used[v.Version] || named.Version(v.Version) || (j != nil && (i < c.keep.JobTrackedVersions || newestStable || v.VersionTag != nil)) {
			continue
		}
		r := c.next(len(k.Namespace) + len(k.ID))
		r.Versions = append(r.Versions, cluster.JobVersionKey{Namespace: k.Namespace, ID: k.ID, Version: v.Version})
	}
}

// nodes forgets those that are down for long and hold nothing.
func (c *collector) nodes(snap *cluster.Snapshot, now cluster.Time) {
	for _, n := range snap.Nodes(nil, "") {
		if n.Status == cluster.NodeStatusDown && c.old(n.StatusUpdatedAt*int64(time.Second), c.keep.NodeGCThreshold, now) &&
			len(snap.AllocsHolding(nil, n.ID)) == 0 {
			r := c.next(len(n.ID))
			r.Nodes = append(r.Nodes, n.ID)
		}
	}
}

// enrolments marks those of nodes that enrolled and never came, as those of collected
// nodes are, and has the rules forget what was marked long ago.
func (c *collector) enrolments(snap *cluster.Snapshot, now cluster.Time) {
	overdue := false
	for _, e := range snap.Enrollments(nil, cluster.RoleNode) {
		switch {
		case e.AbsentTime != 0:
			overdue = overdue || int64(now)-e.AbsentTime >= cluster.KeepEnrollment
		case snap.Node(nil, e.Name) == nil && c.old(e.CreateTime, c.keep.NodeGCThreshold, now):
			r := c.next(len(e.Name))
			r.Nodes = append(r.Nodes, e.Name)
		}
	}
	if overdue && c.reap == nil {
		c.next(0)
	}
}

// tokens forgets ACL and introduction tokens that have expired.
func (c *collector) tokens(snap *cluster.Snapshot, now cluster.Time) {
	acl := &cluster.DeleteACLTokens{OnlyExpired: true}
	for _, t := range snap.ExpiredACLTokens(int64(now), maxTokens) {
		acl.AccessorIDs = append(acl.AccessorIDs, t.AccessorID)
	}
	if len(acl.AccessorIDs) > 0 {
		c.cmds = append(c.cmds, acl)
	}
	intro := &cluster.DeleteIntroTokens{}
	for _, t := range snap.IntroTokens(nil, "") {
		if t.Expired(int64(now)) && len(intro.IDs) < maxTokens {
			intro.IDs = append(intro.IDs, t.ID)
		}
	}
	if len(intro.IDs) > 0 {
		c.cmds = append(c.cmds, intro)
	}
}

// ages counts what one walk leaves, by when it ended, so that the next knows from
// where on there is too much.
type ages struct {
	width  time.Duration
	counts map[int64]int
	before cluster.Time // what ended before is too much
}

func newAges(width time.Duration) ages { return ages{width: width, counts: map[int64]int{}} }

func (g *ages) add(ended int64)       { g.counts[ended/int64(g.width)]++ }
func (g *ages) over(ended int64) bool { return cluster.Time(ended) < g.before }

// turn ends a walk: of what it left, the newest most stay, and in any case what
// ended last.
func (g *ages) turn(most int) {
	buckets := make([]int64, 0, len(g.counts))
	for b := range g.counts {
		buckets = append(buckets, b)
	}
	slices.Sort(buckets)
	slices.Reverse(buckets)
	g.before = 0
	n := 0
	for i, b := range buckets {
		if n += g.counts[b]; n > most && i > 0 {
			g.before = cluster.Time((b + 1) * int64(g.width))
			break
		}
	}
	clear(g.counts)
}
