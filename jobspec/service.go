package jobspec

import (
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/cluster"
)

// Bounds of services.
const (
	MaxServices   = 32      // of a group and its tasks
	MaxChecks     = 32      // of a service
	maxCheckBytes = 4 << 10 // of a check's body and headers
)

var serviceName = regexp.MustCompile(`^(?i:[a-z0-9]|[a-z0-9][a-z0-9-]{0,61}[a-z0-9])$`)

// services converts the services of a group and of its tasks (Nomad: service block).
func (c *checker) services(job *cluster.Job, g *cluster.TaskGroup, in *api.TaskGroup, path string) {
	converted := func(list []*api.Service, path, task string) (out []*cluster.Service) {
		list = present(list)
		for i, s := range list {
			out = append(out, c.service(job, g, s, element(join(path, "service"), i, len(list)), task))
		}
		return out
	}
	g.Services = converted(in.Services, path, "")
	for i, t := range present(in.Tasks) {
		g.Tasks[i].Services = converted(t.Services, join(path, join("task", t.Name)), t.Name)
	}
	all := g.AllServices()
	if len(all) > MaxServices {
		c.fault(path, "has %d services; at most %d are allowed", len(all), MaxServices)
	}
	seen := map[string]bool{}
	for _, s := range all {
		key := strings.Join([]string{s.TaskName, s.Name, s.PortLabel}, " ")
		if seen[key] {
			c.fault(path, "has two services %s on the same port", quote(s.Name))
		}
		seen[key] = true
	}
}

func (c *checker) service(job *cluster.Job, g *cluster.TaskGroup, in *api.Service, path, task string) *cluster.Service {
	s := &cluster.Service{
		Name: in.Name, TaskName: task, Provider: in.Provider, PortLabel: in.PortLabel, AddressMode: in.AddressMode, Address: in.Address,
		Tags: in.Tags, CanaryTags: in.CanaryTags,
	}
	switch s.Provider {
	case cluster.ServiceProviderNomad:
	case "", api.ServiceProviderConsul:
		c.fault(join(path, "provider"), `"consul", the default, %s; set provider = %q`, notYet, cluster.ServiceProviderNomad)
	default:
		c.oneOf(s.Provider, join(path, "provider"), cluster.ServiceProviderNomad)
	}
	if in.TaskName != "" && task != "" && in.TaskName != task {
		c.fault(join(path, "task"), "is %s, but the service is one of task %s", quote(in.TaskName), quote(task))
	}
	if s.Name == "" {
		if s.Name = "${JOB}-${TASKGROUP}"; task != "" {
			s.Name = "${BASE}"
		}
	}
	if s.AddressMode == "" {
		s.AddressMode = "auto"
	}
	c.oneOf(s.AddressMode, join(path, "address_mode"), "auto", "host")
	if s.Address != "" && in.AddressMode != "" && in.AddressMode != "auto" {
		c.fault(join(path, "address"), `means nothing unless the address_mode is "auto"`)
	}
	c.servicePort(g, s.PortLabel, join(path, "port"))
	c.onUpdate(in.OnUpdate, join(path, "on_update"))
	for at, text := range map[string]string{"name": s.Name, "address": s.Address} {
		c.refers(text, join(path, at))
	}
	for _, text := range slices.Concat(s.Tags, s.CanaryTags) {
		c.refers(text, join(path, "tags"))
	}
	sample := &cluster.Allocation{
		ID: "00000000-0000-0000-0000-000000000000", Namespace: job.Namespace, JobID: job.ID, TaskGroup: g.Name,
		Name: fmt.Sprintf("%s.%s[0]", job.ID, g.Name),
	}
	if name := s.Expand(s.Name, job, sample); cluster.ForeignReference(s.Name) == "" && !serviceName.MatchString(name) {
		c.fault(join(path, "name"), "%s is no name of a service: 1 to 63 letters, digits and -, with a letter or digit at both ends", quote(name))
	}

	if len(in.Checks) > MaxChecks {
		c.fault(path, "has %d checks; at most %d are allowed", len(in.Checks), MaxChecks)
		return s
	}
	seen := map[string]bool{}
	for i := range in.Checks {
		at := element(join(path, "check"), i, len(in.Checks))
		check := c.check(g, s, in, &in.Checks[i], at)
		if seen[check.Name] {
			c.fault(join(at, "name"), "the service has two checks %s; give one of them another name", quote(check.Name))
		}
		seen[check.Name] = true
		s.Checks = append(s.Checks, check)
	}
	return s
}

func (c *checker) check(g *cluster.TaskGroup, s *cluster.Service, service *api.Service, in *api.ServiceCheck, path string) *cluster.ServiceCheck {
	out := &cluster.ServiceCheck{
		Name: in.Name, TaskName: in.TaskName, Type: in.Type, Protocol: in.Protocol, Path: in.Path, Method: in.Method, Body: in.Body, Header: in.Header,
		PortLabel: in.PortLabel, TLSServerName: in.TLSServerName, TLSSkipVerify: in.TLSSkipVerify, Interval: in.Interval, Timeout: in.Timeout,
		OnUpdate: in.OnUpdate,
	}
	if out.Name == "" {
		out.Name = fmt.Sprintf("service: %q check", s.Name)
	}
	if out.OnUpdate == "" {
		out.OnUpdate = service.OnUpdate
	}
	if out.OnUpdate == "" {
		out.OnUpdate = cluster.OnUpdateRequireHealthy
	}
	c.onUpdate(in.OnUpdate, join(path, "on_update"))
	for at, text := range map[string]string{"path": out.Path, "body": out.Body, "name": out.Name} {
		c.refers(text, join(path, at))
	}

	size := len(out.Body)
	for name, values := range out.Header {
		size += len(name)
		for _, v := range values {
			c.refers(v, join(path, "header"))
			size += len(v)
		}
	}
	if size > maxCheckBytes {
		c.fault(path, "has %d bytes of body and headers; at most %d are allowed", size, maxCheckBytes)
	}
	switch out.Type {
	case cluster.CheckHTTP:
		c.httpCheck(out, path)
	case cluster.CheckTCP:
		for name, given := range map[string]bool{
			"path": out.Path != "", "protocol": out.Protocol != "", "method": out.Method != "", "body": out.Body != "", "header": len(out.Header) > 0,
			"tls_server_name": out.TLSServerName != "", "tls_skip_verify": out.TLSSkipVerify,
		} {
			if given {
				c.fault(join(path, name), "means nothing in a check of type tcp")
			}
		}
	case "":
		c.fault(join(path, "type"), "is missing: http or tcp")
	default:
		c.oneOf(out.Type, join(path, "type"), cluster.CheckHTTP, cluster.CheckTCP)
	}
	if out.PortLabel != "" {
		c.servicePort(g, out.PortLabel, join(path, "port"))
	} else if s.PortLabel == "" {
		c.fault(join(path, "port"), "is missing, and the service has none")
	}
	if in.AddressMode != "" {
		c.oneOf(in.AddressMode, join(path, "address_mode"), "auto", "host")
	}
	for _, d := range []struct {
		name string
		is   time.Duration
	}{{"interval", out.Interval}, {"timeout", out.Timeout}} {
		if d.is < time.Second {
			c.fault(join(path, d.name), "is %v; it must be at least 1s", d.is)
		}
	}
	c.checkRestart(g, s, service, in, out, path)
	return out
}

func (c *checker) httpCheck(out *cluster.ServiceCheck, path string) {
	if !strings.HasPrefix(out.Path, "/") {
		c.fault(join(path, "path"), "%s must begin with /", quote(out.Path))
	}
	if out.Protocol == "" {
		out.Protocol = "http"
	}
	if out.Method == "" {
		out.Method = http.MethodGet
	}
	c.oneOf(out.Protocol, join(path, "protocol"), "http", "https")
	c.oneOf(out.Method, join(path, "method"), http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodOptions, http.MethodPatch)
	if out.Protocol == "http" && (out.TLSServerName != "" || out.TLSSkipVerify) {
		c.fault(join(path, "protocol"), "is http; tls_server_name and tls_skip_verify are for https")
	}
}

// checkRestart takes a check's own block or, field by field, its service's.
func (c *checker) checkRestart(g *cluster.TaskGroup, s *cluster.Service, service *api.Service, in *api.ServiceCheck, out *cluster.ServiceCheck, path string) {
	if service.CheckRestart == nil && in.CheckRestart == nil {
		return
	}
	r, at := &cluster.CheckRestart{Grace: time.Second}, join(path, "check_restart")
	for _, from := range []*api.CheckRestart{service.CheckRestart, in.CheckRestart} {
		if from != nil {
			r.Grace = or(from.Grace, r.Grace)
			if from.Limit != 0 {
				r.Limit = from.Limit
			}
		}
	}
	if r.Limit < 0 {
		c.fault(join(at, "limit"), "must not be negative")
	}
	c.notNegative(r.Grace, join(at, "grace"))
	if r.Limit == 0 {
		return // as in Nomad: it is switched off
	}
	out.CheckRestart = r
	if out.TaskName == "" {
		out.TaskName = s.TaskName
	}
	if out.TaskName == "" {
		out.TaskName = service.TaskName
	}
	var names []string
	for _, t := range g.Tasks {
		names = append(names, t.Name)
	}
	switch {
	case out.TaskName == "" && len(names) == 1:
		out.TaskName = names[0]
	case out.TaskName == "":
		c.fault(join(path, "task"), "is missing: which task is check_restart to restart?%s", known(names))
	case !slices.Contains(names, out.TaskName):
		c.fault(join(path, "task"), "the group has no task %s%s%s", quote(out.TaskName), didYouMean(out.TaskName, names), known(names))
	}
}

// servicePort wants the label of a port of the group's network, or a number.
func (c *checker) servicePort(g *cluster.TaskGroup, label, path string) {
	if label == "" {
		return
	}
	if n, err := strconv.Atoi(label); err == nil {
		if n < 1 || n > 65535 {
			c.fault(path, "is %d; a port is a label of the group's network or a number from 1 to 65535", n)
		}
		return
	}
	if labels := portLabels(g); !slices.Contains(labels, label) {
		c.fault(path, "the group's network has no port %s%s%s", quote(label), didYouMean(label, labels), known(labels))
	}
}

func (c *checker) onUpdate(v, path string) {
	if v != "" {
		c.oneOf(v, path, cluster.OnUpdateRequireHealthy, cluster.OnUpdateIgnoreWarnings, cluster.OnUpdateIgnore)
	}
}

// refers wants that a text of a service refers to nothing but what servers and nodes both know.
func (c *checker) refers(text, path string) {
	if ref := cluster.ForeignReference(text); ref != "" {
		c.fault(path, "refers to %s, which services cannot%s", ref, known(cluster.ServiceReferences))
	}
}
