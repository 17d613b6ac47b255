package cluster

// MaxReapedOfJob bounds what of a job leaves in the same entry as the job itself;
// the rest is then of no job, and is reaped by its IDs.
const MaxReapedOfJob = 1000

// JobVersionKey names one version of a job.
type JobVersionKey struct {
	Namespace, ID string
	Version       uint64
}

// reap forgets terminal records; what is live, still referred to, or the origin of a
// model stays.
func (t *tx) reap(c *Reap) {
	for _, id := range c.Evals {
		if e := t.Eval(nil, id); e != nil && e.Terminal() && !t.Lineage(e.JobKey()).Eval(id) {
			t.delete(TableEvals, e)
			t.dirty[e.JobKey()] = true
		}
	}
	orphans := map[JobKey]bool{}
	for _, id := range c.Allocs {
		if a := t.Alloc(nil, id); a != nil && a.ClientTerminal() && !t.Lineage(a.JobKey()).Alloc(id) {
			t.delete(TableAllocs, a)
			orphans[a.JobKey()] = t.Job(nil, a.JobKey()) == nil
		}
	}
	for _, id := range c.Deployments {
		if d := t.Deployment(nil, id); d != nil && !d.Active() {
			t.delete(TableDeployments, d)
		}
	}
	for _, k := range c.Jobs {
		if j := t.Job(nil, k); j != nil && j.Status == JobStatusDead && t.Lineage(k) == nil {
			t.reapJob(j)
			orphans[k] = true
		}
	}
	for _, v := range c.Versions {
		t.reapVersion(v)
	}
	for k, gone := range orphans { // order does not matter: each job is on its own
		if gone {
			t.reapOrphanVersions(k)
		}
	}
	for _, id := range c.Nodes {
		switch n := t.Node(nil, id); {
		case n == nil: // it enrolled and never came
			t.absent(id)
		case n.Status == NodeStatusDown && len(t.AllocsHolding(nil, id)) == 0:
			t.delete(TableNodes, n)
			t.absent(id)
		}
	}
	t.reapEnrollments()
}

// reapJob forgets a job with what is its own, up to a bound.
func (t *tx) reapJob(j *Job) {
	k := j.Key()
	t.purgeJob(j)
	left := MaxReapedOfJob
	for _, e := range t.EvalsByJob(nil, k) {
		if left--; left >= 0 {
			t.delete(TableEvals, e)
		}
	}
	for _, a := range t.AllocsByJob(nil, k) {
		if !a.ClientTerminal() {
			continue
		}
		if left--; left >= 0 {
			t.delete(TableAllocs, a)
		}
	}
	for _, d := range t.DeploymentsByJob(nil, k) {
		if left--; left >= 0 {
			t.delete(TableDeployments, d)
		}
	}
}

// reapVersion forgets a version that is not the job's current one and that
// nothing runs.
func (t *tx) reapVersion(key JobVersionKey) {
	k := JobKey{key.Namespace, key.ID}
	v := t.JobVersion(nil, k, key.Version)
	if j := t.Job(nil, k); v == nil || (j != nil && j.Version == v.Version) || t.Lineage(k).Version(key.Version) || (j != nil && v.VersionTag != nil) {
		return
	}
	for _, a := range t.AllocsByJob(nil, k) {
		if a.JobVersion == v.Version && a.Occupies() {
			return
		}
	}
	t.deleteVersion(v)
}

func (t *tx) deleteVersion(v *Job) {
	t.delete(TableJobVersions, v)
	if s := t.Submission(nil, v.Key(), v.Version); s != nil {
		t.delete(TableSubmissions, s)
	}
}

// reapOrphanVersions forgets the versions of a purged job that no allocation has
// any more.
func (t *tx) reapOrphanVersions(k JobKey) {
	used := map[uint64]bool{}
	for _, a := range t.AllocsByJob(nil, k) {
		used[a.JobVersion] = true
	}
	named := t.Lineage(k)
	for _, v := range t.JobVersions(nil, k) {
		if !used[v.Version] && !named.Version(v.Version) {
			t.deleteVersion(v)
		}
	}
}
