package api

import (
	"strconv"

	"github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/acl"
	"github.com/rxvision/rxvision/cluster"
	"github.com/rxvision/rxvision/jobspec"
)

// jobStub is a job in a list.
type jobStub struct {
	ID                string
	ParentID          string
	Name              string
	Namespace         string
	Datacenters       []string
	NodePool          string
	Type              string
	Priority          int
	Periodic          bool
	ParameterizedJob  bool
	Stop              bool
	Status            string
	StatusDescription string
	JobSummary        *cluster.JobSummary
	Meta              map[string]string `json:",omitempty"`
	CreateIndex       uint64
	ModifyIndex       uint64
	JobModifyIndex    uint64
	SubmitTime        int64
}

func stubOfJob(snap *cluster.Snapshot, j *cluster.Job, meta bool) *jobStub {
	stub := &jobStub{
		ID: j.ID, ParentID: j.ParentID, Name: j.Name, Namespace: j.Namespace, Periodic: j.Periodic != nil, ParameterizedJob: j.Parameterized(), Datacenters: j.Datacenters, NodePool: j.NodePool,
		Type: j.Type, Priority: j.Priority, Stop: j.Stop, Status: j.Status, StatusDescription: j.StatusDescription,
		JobSummary:  withChildren(j.Key(), snap.Summary(nil, j.Key())),
		CreateIndex: j.CreateIndex, ModifyIndex: j.ModifyIndex, JobModifyIndex: j.JobModifyIndex, SubmitTime: j.SubmitTime,
	}
	if meta {
		stub.Meta = j.Meta
	}
	return stub
}

// withChildren gives a summary all the parts that clients read; the state always
// has one, but a client that gets none would crash.
func withChildren(k cluster.JobKey, s *cluster.JobSummary) *cluster.JobSummary {
	out := cluster.JobSummary{JobID: k.ID, Namespace: k.Namespace}
	if s != nil {
		out = *s
	}
	if out.Children == nil {
		out.Children = new(cluster.ChildrenSummary)
	}
	return &out
}

func (s *Server) listJobs(r *request) (any, error) {
	meta, err := r.flag("meta", true)
	if err != nil {
		return nil, err
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		return s.jobPage(r, snap, ws, snap.Jobs(ws, r.namespace, r.prefix), meta)
	})
}

func (s *Server) jobPage(r *request, snap *cluster.Snapshot, ws cluster.WatchSet, jobs []*cluster.Job, meta bool) found {
	stub := func(j *cluster.Job) any { return stubOfJob(snap, j, meta) }
	index := snap.Index(ws, cluster.TableJobs, cluster.TableSummaries)
	at := func(j *cluster.Job) position { return named(j.Namespace, j.ID) }
	jobs = seen(r, acl.ListJobs, jobs, func(j *cluster.Job) string { return j.Namespace })
	return page(r, index, jobs, true, at, stub, stub)
}

func (s *Server) readJob(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		j := snap.Job(ws, r.jobKey())
		if j == nil {
			return missing(snap, ws, cluster.TableJobs, "job not found")
		}
		return found{body: j, index: j.ModifyIndex}
	})
}

func (s *Server) jobSummary(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		sum := snap.Summary(ws, r.jobKey())
		if sum == nil {
			return missing(snap, ws, cluster.TableSummaries, "job not found")
		}
		return found{body: withChildren(r.jobKey(), sum), index: sum.ModifyIndex}
	})
}

// jobVersionsReply is all kept versions of a job, newest first; Diffs[i] tells
// how Versions[i] differs from Versions[i+1].
type jobVersionsReply struct {
	Versions []*cluster.Job
	Diffs    []*api.JobDiff
	Index    uint64
}

func (s *Server) jobVersions(r *request) (any, error) {
	diffs, err := r.flag("diffs", true)
	if err != nil {
		return nil, err
	}
	tag, wanted := r.query.Get("diff_tag"), r.query.Get("diff_version")
	if tag != "" && wanted != "" {
		return nil, badRequest("diff_tag and diff_version cannot both be given")
	}
	var against *uint64
	if v := wanted; v != "" {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			return nil, badRequest("Expect a number for `diff_version` query string parameter")
		}
		against = &n
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		versions := snap.JobVersions(ws, r.jobKey())
		if snap.Job(ws, r.jobKey()) == nil { // purged: allocations may keep versions
			return missing(snap, ws, cluster.TableJobVersions, "job versions not found")
		}
		against := against
		if tag != "" {
			v := snap.JobVersionByTag(nil, r.jobKey(), tag)
			if v == nil {
				return found{index: snap.Index(nil, cluster.TableJobVersions), err: notFound("tag %q not found on job %q", tag, r.params["job"])}
			}
			against = &v.Version
		}
		reply := &jobVersionsReply{Versions: versions}
		for i, v := range versions {
			reply.Index = max(reply.Index, v.ModifyIndex)
			switch {
			case !diffs:
			case against != nil:
				if v.Version != *against {
					reply.Diffs = append(reply.Diffs, jobspec.Diff(snap.JobVersion(nil, r.jobKey(), *against), v, true, nil))
				}
			case i+1 < len(versions):
				reply.Diffs = append(reply.Diffs, jobspec.Diff(versions[i+1], v, true, nil))
			}
		}
		return found{body: reply, index: reply.Index}
	})
}

// jobSource is a submission under the field names of Nomad's API.
type jobSource struct {
	*cluster.JobSubmission
	JobModifyIndex uint64
}

func (s *Server) jobSubmission(r *request) (any, error) {
	version, err := strconv.ParseUint(r.query.Get("version"), 10, 64)
	if err != nil {
		return nil, badRequest("Expect a number for `version` query string parameter")
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		sub := snap.Submission(ws, r.jobKey(), version)
		if sub == nil {
			return missing(snap, ws, cluster.TableSubmissions, "job source not found")
		}
		return found{body: &jobSource{sub, sub.JobModifyIndex}, index: sub.JobModifyIndex}
	})
}

func (s *Server) jobAllocs(r *request) (any, error) {
	all, err := r.flag("all", true)
	if err != nil {
		return nil, err
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		allocs := snap.AllocsByJob(ws, r.jobKey())
		if j := snap.Job(ws, r.jobKey()); j != nil && !all {
			allocs = only(allocs, func(a *cluster.Allocation) bool { return a.JobCreateIndex == j.CreateIndex })
		}
		return allocPage(r, snap, ws, allocs, allocFields{states: true})
	})
}

// only keeps the items that belong.
func only[T any](list []T, belongs func(T) bool) []T {
	var out []T
	for _, v := range list {
		if belongs(v) {
			out = append(out, v)
		}
	}
	return out
}

func (s *Server) jobEvals(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		return evalPage(r, snap, ws, snap.EvalsByJob(ws, r.jobKey()))
	})
}

func (s *Server) jobDeployments(r *request) (any, error) {
	all, err := r.flag("all", true)
	if err != nil {
		return nil, err
	}
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		list := snap.DeploymentsByJob(ws, r.jobKey())
		if j := snap.Job(ws, r.jobKey()); j != nil && !all {
			list = only(list, func(d *cluster.Deployment) bool { return d.JobCreateIndex == j.CreateIndex })
		}
		return deploymentPage(r, snap, ws, list)
	})
}

func (s *Server) jobDeployment(r *request) (any, error) {
	return s.read(r, func(snap *cluster.Snapshot, ws cluster.WatchSet) found {
		d := snap.LatestDeployment(ws, r.jobKey())
		if j := snap.Job(ws, r.jobKey()); d == nil || j != nil && d.JobCreateIndex != j.CreateIndex {
			return found{body: null{}, index: snap.Index(ws, cluster.TableDeployments)}
		}
		return found{body: d, index: d.ModifyIndex}
	})
}
