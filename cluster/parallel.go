package cluster

import "strconv"

// MetaMaxParallel is the key of a parameterized job's meta that bounds how many of its children run at a time;
// the others wait. Without it all may.
const MetaMaxParallel = "rx_max_parallel"

// MaxParallel bounds the value of MetaMaxParallel.
const MaxParallel = 100_000

// ParallelChildren says how many children of a child's parent run, and how many may. The limit is 0 where there is
// none: for jobs that are no children, for those that run already, and while their parent is gone.
func (s *Snapshot) ParallelChildren(child *Job) (limit, running int) {
	if child.ParentID == "" || !child.Dispatched {
		return 0, 0
	}
	parent := s.Job(nil, child.parent())
	if parent == nil || parent.Meta[MetaMaxParallel] == "" {
		return 0, 0
	}
	n, err := strconv.Atoi(parent.Meta[MetaMaxParallel])
	sum := s.Summary(nil, parent.Key())
	if err != nil || n <= 0 || sum == nil || sum.Children == nil {
		return 0, 0
	}
	if now := s.Job(nil, child.Key()); now != nil && now.Status == JobStatusRunning {
		return 0, 0
	}
	return n, int(sum.Children.Running)
}

// mayBegin says whether a plan may place something of a job, and counts a child that begins: its status is
// derived when all plans of the command are in.
func (t *tx) mayBegin(j *Job) bool {
	limit, running := t.ParallelChildren(j)
	if limit == 0 || t.begun[j.Key()] > 0 {
		return true
	}
	if running+t.begun[j.parent()] >= limit {
		return false
	}
	if t.begun == nil {
		t.begun = map[JobKey]int{}
	}
	t.begun[j.Key()]++
	t.begun[j.parent()]++
	return true
}
