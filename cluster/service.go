package cluster

import (
	"crypto/sha256"
	"encoding/hex"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ServiceProviderNomad keeps registrations in the servers themselves: what runs and has a service is registered, and
// nothing else is. No record says so a second time.
const ServiceProviderNomad = "nomad"

// Types of checks, and what becomes of an update while one of them fails.
const (
	CheckHTTP = "http"
	CheckTCP  = "tcp"

	OnUpdateRequireHealthy = "require_healthy"
	OnUpdateIgnoreWarnings = "ignore_warnings"
	OnUpdateIgnore         = "ignore"
)

// Service is a name under which allocations of a group are to be found (Nomad: service block,
// https://developer.hashicorp.com/nomad/docs/job-specification/service).
type Service struct {
	Name        string
	TaskName    string // of a task: registered while that runs; "": while the allocation does
	Provider    string
	PortLabel   string // of the group's network, or a number; "": none
	AddressMode string // auto or host
	Address     string // instead of the node's
	Tags        []string
	CanaryTags  []string // instead of Tags while the allocation is a canary
	Checks      []*ServiceCheck
}

// ServiceCheck is a question that the node asks an allocation, again and again (Nomad: check block,
// https://developer.hashicorp.com/nomad/docs/job-specification/check).
type ServiceCheck struct {
	Name          string
	TaskName      string // that CheckRestart restarts
	Type          string // http or tcp
	Protocol      string // of http: http or https
	Path          string
	Method        string
	Body          string
	Header        map[string][]string
	PortLabel     string // "": the service's
	TLSServerName string
	TLSSkipVerify bool
	Interval      time.Duration
	Timeout       time.Duration
	OnUpdate      string
	CheckRestart  *CheckRestart // nil: a failure restarts nothing
}

// CheckRestart restarts a task that fails a check (Nomad: check_restart block).
type CheckRestart struct {
	Limit int           // failures in a row
	Grace time.Duration // after the task's start, in which failures do not count
}

// ServiceRegistration is a place where a service is to be had, under the field names of Nomad's API.
type ServiceRegistration struct {
	ID          string
	ServiceName string
	Namespace   string
	NodeID      string
	Datacenter  string
	JobID       string
	AllocID     string
	Tags        []string
	Address     string
	Port        int
	CreateIndex uint64
	ModifyIndex uint64
}

// hasServices says whether something of the job is to be found by a name.
func (j *Job) hasServices() bool {
	return slices.ContainsFunc(j.TaskGroups, func(g *TaskGroup) bool { return g != nil && len(g.AllServices()) > 0 })
}

// AllServices are the services of the group and of its tasks.
func (g *TaskGroup) AllServices() []*Service {
	all := g.Services
	for _, t := range g.Tasks {
		if t != nil && len(t.Services) > 0 {
			all = slices.Concat(all, t.Services)
		}
	}
	return all
}

var serviceReference = regexp.MustCompile(`\$\{([^}]*)\}`)

// ServiceReferences are what ${…} in names, tags and checks of services may refer to.
var ServiceReferences = []string{
	"JOB", "TASKGROUP", "GROUP", "TASK", "BASE",
	"NOMAD_JOB_ID", "NOMAD_JOB_NAME", "NOMAD_JOB_PARENT_ID", "NOMAD_GROUP_NAME", "NOMAD_TASK_NAME", "NOMAD_NAMESPACE", "NOMAD_REGION",
	"NOMAD_ALLOC_ID", "NOMAD_SHORT_ALLOC_ID", "NOMAD_ALLOC_NAME", "NOMAD_ALLOC_INDEX",
}

// ForeignReference finds a ${…} that services cannot refer to; "" when there is none.
func ForeignReference(text string) string {
	for _, m := range serviceReference.FindAllStringSubmatch(text, -1) {
		if !slices.Contains(ServiceReferences, m[1]) {
			return m[0]
		}
	}
	return ""
}

// Expand replaces the references in a text of the service by what they mean for an allocation of the job.
func (s *Service) Expand(text string, j *Job, a *Allocation) string {
	if !strings.Contains(text, "${") {
		return text
	}
	return serviceReference.ReplaceAllStringFunc(text, func(ref string) string {
		switch ref[2 : len(ref)-1] {
		case "JOB", "NOMAD_JOB_NAME":
			return j.Name
		case "NOMAD_JOB_ID":
			return j.ID
		case "NOMAD_JOB_PARENT_ID":
			return j.ParentID
		case "TASKGROUP", "GROUP", "NOMAD_GROUP_NAME":
			return a.TaskGroup
		case "TASK", "NOMAD_TASK_NAME":
			return s.TaskName
		case "BASE":
			return strings.TrimSuffix(j.Name+"-"+a.TaskGroup+"-"+s.TaskName, "-")
		case "NOMAD_NAMESPACE":
			return a.Namespace
		case "NOMAD_REGION":
			return j.Region
		case "NOMAD_ALLOC_ID":
			return a.ID
		case "NOMAD_SHORT_ALLOC_ID":
			return a.ID[:min(len(a.ID), 8)]
		case "NOMAD_ALLOC_NAME":
			return a.Name
		case "NOMAD_ALLOC_INDEX":
			return strconv.Itoa(IndexOf(a.Name))
		}
		return ref
	})
}

// CheckID names a check of an allocation for as long as its group has it.
func CheckID(a *Allocation, s *Service, c *ServiceCheck) string {
	sum := sha256.Sum256([]byte(strings.Join([]string{a.ID, a.TaskGroup, s.TaskName, s.Name, c.Name}, sep)))
	return "_nomad-check-" + hex.EncodeToString(sum[:20])
}

// Port gives the address of a port of an allocation by its label, or of any port by its number; host is where ports
// without an address of their own are. 0 when there is no such port.
func (a *Allocation) Port(label, host string) (address string, port int) {
	if a.AllocatedResources != nil {
		for _, p := range a.AllocatedResources.Shared.Ports {
			if p.Label == label {
				if p.HostIP != "" {
					host = p.HostIP
				}
				return host, p.Value
			}
		}
	}
	port, err := strconv.Atoi(label)
	if err != nil {
		return host, 0
	}
	return host, port
}

// Services are the places at which the services of a namespace (* for all) are to be had, by namespace, name and ID.
func (s *Snapshot) Services(ws WatchSet, namespace string) (all []*ServiceRegistration) {
	var prefix []string
	if namespace != "*" {
		prefix = []string{namespace, ""}
	}
	var last JobKey
	for _, j := range list[Job](s.txn, ws, TableJobVersions, "services_prefix", prefix...) {
		if j.Key() != last {
			last = j.Key()
			all = append(all, s.JobServices(ws, last)...)
		}
	}
	slices.SortFunc(all, func(a, b *ServiceRegistration) int {
		return slices.Compare([]string{a.Namespace, a.ServiceName, a.ID}, []string{b.Namespace, b.ServiceName, b.ID})
	})
	return all
}

// JobServices are the places at which the services of a job are to be had.
func (s *Snapshot) JobServices(ws WatchSet, k JobKey) (all []*ServiceRegistration) {
	for _, a := range s.AllocsByJob(ws, k) {
		all = append(all, s.AllocServices(ws, a)...)
	}
	return all
}

// AllocServices are the services that are to be had at an allocation: all of its group while it runs, but those of a
// task only while that does.
func (s *Snapshot) AllocServices(ws WatchSet, a *Allocation) (all []*ServiceRegistration) {
	if a.ServerTerminal() || a.ClientStatus != AllocClientRunning {
		return nil
	}
	j := s.JobVersion(nil, a.JobKey(), a.JobVersion)
	if j == nil || j.Group(a.TaskGroup) == nil {
		return nil
	}
	services := j.Group(a.TaskGroup).AllServices()
	if len(services) == 0 {
		return nil
	}
	n := s.Node(ws, a.NodeID)
	if n == nil {
		return nil
	}
	canary := a.DeploymentStatus != nil && a.DeploymentStatus.Canary
	for _, svc := range services {
		if svc.TaskName != "" {
			a = a.Whole()
			if t := a.TaskStates[svc.TaskName]; t == nil || t.State != TaskStateRunning {
				continue
			}
		}
		r := &ServiceRegistration{
			ServiceName: svc.Expand(svc.Name, j, a), Namespace: a.Namespace, NodeID: a.NodeID, Datacenter: n.Datacenter,
			JobID: a.JobID, AllocID: a.ID, CreateIndex: a.CreateIndex, ModifyIndex: a.ModifyIndex, Tags: []string{},
		}
		tags := svc.Tags
		if canary && len(svc.CanaryTags) > 0 {
			tags = svc.CanaryTags
		}
		for _, t := range tags {
			r.Tags = append(r.Tags, svc.Expand(t, j, a))
		}
		r.Address, r.Port = a.Port(svc.PortLabel, n.Attributes["unique.network.ip-address"])
		if svc.Address != "" {
			r.Address = svc.Expand(svc.Address, j, a)
		}
		where := "group-" + a.TaskGroup
		if svc.TaskName != "" {
			where = svc.TaskName
		}
		r.ID = strings.Join([]string{"_nomad-task", a.ID, where, r.ServiceName, svc.PortLabel}, "-")
		all = append(all, r)
	}
	return all
}
