package jobspec

import (
	"fmt"
	"reflect"
	"slices"
	"time"

	"github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/cluster"
)

// Options are what a job is checked against besides the rules of the dialect.
type Options struct {
	// Drivers are the task drivers that a job may name.
	Drivers []string
	// Region is the region that the job is for: a job that names none belongs to
	// it, one that names another is at fault. Empty takes any region, and
	// DefaultRegion where the job names none.
	Region string
}

// DefaultRegion is the region of a job where nobody names one.
const DefaultRegion = "global"

// FromAPI makes the job that the state keeps out of the job that a user submitted:
// it fills in the defaults that Nomad documents, folds the job's update, reschedule
// and migrate blocks into its groups, and gives the group of an onnx task a port to
// serve on. Equal jobs give equal results, and a result that was marshalled and
// submitted again comes out the same. job is not changed.
//
// A job with anything wrong gives Faults with all of it. Warnings are sentences
// about a good job that its owner may want to know.
func FromAPI(job *api.Job, o Options) (*cluster.Job, []string, error) {
	if job == nil {
		return nil, nil, Faults{{Path: jobPath, Text: "there is no job"}}
	}
	c := &checker{options: o}
	out := c.job(job)
	c.unsupported(reflect.ValueOf(job).Elem(), nil)
	if len(c.faults) > 0 {
		return nil, nil, c.faults
	}
	return out, c.warnings, nil
}

// checker collects what is wrong with a job on the way from one form to the other.
type checker struct {
	options  Options
	faults   Faults
	warnings []string
}

func (c *checker) fault(path, format string, args ...any) {
	c.faults = append(c.faults, Fault{Path: orJob(path), Text: fmt.Sprintf(format, args...)})
}

func (c *checker) warn(path, format string, args ...any) {
	c.warnings = append(c.warnings, path+": "+fmt.Sprintf(format, args...))
}

func or[T any](p *T, def T) T {
	if p == nil {
		return def
	}
	return *p
}

// present drops the null elements of a list; unsupported has reported them.
func present[T any](list []*T) []*T {
	return slices.DeleteFunc(slices.Clone(list), func(p *T) bool { return p == nil })
}

func (c *checker) job(in *api.Job) *cluster.Job {
	out := &cluster.Job{
		Region:      or(in.Region, ""),
		Namespace:   or(in.Namespace, cluster.DefaultNamespace),
		ID:          or(in.ID, ""),
		Name:        or(in.Name, or(in.ID, "")),
		Type:        or(in.Type, cluster.JobTypeService),
		Priority:    or(in.Priority, cluster.DefaultPriority),
		AllAtOnce:   or(in.AllAtOnce, false),
		Datacenters: slices.Clone(in.Datacenters),
		NodePool:    or(in.NodePool, ""),
		Meta:        c.meta(in.Meta, "meta", levelJob),
	}
	if out.Region == "" {
		out.Region = c.options.Region
	}
	if out.Region == "" {
		out.Region = DefaultRegion
	}
	if out.Namespace == "" {
		out.Namespace = cluster.DefaultNamespace
	}
	if out.NodePool == "" {
		out.NodePool = cluster.DefaultNodePool
	}
	if len(out.Datacenters) == 0 {
		out.Datacenters = []string{"*"}
	}
	c.jobNames(out)
	c.noChild(in)
	out.Periodic = c.periodic(out.Type, in.Periodic)
	out.ParameterizedJob = c.parameterized(out.Type, in.ParameterizedJob)
	c.maxParallel(out)
	out.Constraints = c.constraints(in.Constraints, "", levelJob)
	out.Affinities, out.Spreads = c.affinities(in.Affinities, "", levelJob), c.spreads(in.Spreads, "")
	if out.AllAtOnce && out.PerNode() {
		c.warn("all_at_once", "changes nothing in a job of type %s, whose nodes get their allocations one by one", out.Type)
		out.AllAtOnce = false
	}

	groups := present(in.TaskGroups)
	if len(groups) == 0 {
		c.fault(jobPath, "has no task group")
	}
	if len(groups) > MaxGroups {
		c.fault(jobPath, "has %d task groups; at most %d are allowed", len(groups), MaxGroups)
		return out
	}
	seen := map[string]bool{}
	for _, g := range groups {
		path := join("group", or(g.Name, ""))
		c.groupName(or(g.Name, ""), path, seen)
		out.TaskGroups = append(out.TaskGroups, c.group(in, out, g, path))
	}
	c.promotion(out)
	return out
}

// promotion warns of a group for which all canaries wait, though others would be promoted by themselves.
func (c *checker) promotion(j *cluster.Job) {
	auto := slices.ContainsFunc(j.TaskGroups, func(g *cluster.TaskGroup) bool { return g.Update != nil && g.Update.AutoPromote })
	for _, g := range j.TaskGroups {
		if auto && g.Update != nil && g.Update.Canary > 0 && !g.Update.AutoPromote {
			c.warn(join("group", g.Name)+".update.auto_promote", "is not set, but another group's is: canaries are promoted automatically only if all groups that have canaries want it")
		}
	}
}

func (c *checker) group(job *api.Job, out *cluster.Job, in *api.TaskGroup, path string) *cluster.TaskGroup {
	endless := out.Type == cluster.JobTypeService || out.Type == cluster.JobTypeSystem
	g := &cluster.TaskGroup{
		Name:             or(in.Name, ""),
		Count:            or(in.Count, 1),
		Constraints:      c.constraints(in.Constraints, path, levelGroup),
		RestartPolicy:    c.restart(endless, in.RestartPolicy, nil, join(path, "restart")),
		ReschedulePolicy: c.reschedule(out.Type, job.Reschedule, in.ReschedulePolicy, join(path, "reschedule")),
		EphemeralDisk:    c.disk(in.EphemeralDisk, join(path, "ephemeral_disk")),
		Networks:         c.networks(in.Networks, path),
		Meta:             c.meta(in.Meta, join(path, "meta"), levelGroup),
		ShutdownDelay:    in.ShutdownDelay,
		Affinities:       c.affinities(in.Affinities, path, levelGroup),
		Spreads:          c.spreads(in.Spreads, path),
	}
	if g.Count < 0 {
		c.fault(join(path, "count"), "must not be negative")
	}
	if g.Count > MaxCount {
		c.fault(join(path, "count"), "is %d; at most %d are allowed", g.Count, MaxCount)
	}
	if in.ShutdownDelay != nil {
		c.notNegative(*in.ShutdownDelay, join(path, "shutdown_delay"))
	}
	g.Update = c.update(out.Type, job.Update, in.Update, g.Count, join(path, "update"))
	g.Scaling = c.scaling(in.Scaling, g.Count, join(path, "scaling"))
	g.Disconnect = c.disconnect(in, path)
	if out.PerNode() {
		c.perNode(job, out.Type, in, path)
	}
	g.Migrate = c.migrate(out.Type, job.Migrate, in.Migrate, join(path, "migrate"))
	g.Gang = c.gang(out, g, join(path, "meta"))
	g.Preempt = c.preempt(g.Meta, join(path, "meta"))
	g.MaxRunDuration = c.span(g.Meta, "rx_max_run_duration", join(path, "meta"), cluster.MaxRunLimit)

	tasks := present(in.Tasks)
	if len(tasks) == 0 {
		c.fault(path, "has no task")
	}
	if len(tasks) > MaxTasks {
		c.fault(path, "has %d tasks; at most %d are allowed", len(tasks), MaxTasks)
		return g
	}
	seen := map[string]bool{}
	leader, logs := "", 0
	for _, t := range tasks {
		at := join(path, join("task", t.Name))
		c.taskName(t.Name, at, seen)
		task := c.task(endless, g, t, in.RestartPolicy, at)
		task.DispatchPayload = c.dispatchPayload(out, t.DispatchPayload, join(at, "dispatch_payload"))
		g.Tasks = append(g.Tasks, task)
		if task.Leader {
			if leader != "" {
				c.fault(join(at, "leader"), "task %s is the group's leader already; a group has one", quote(leader))
			}
			leader = t.Name
		}
		if !task.LogConfig.Disabled {
			logs += task.LogConfig.MaxFiles * task.LogConfig.MaxFileSizeMB
		}
	}
	if logs > g.EphemeralDisk.SizeMB {
		c.fault(join(path, "ephemeral_disk.size"), "the tasks' logs may take %d MB, more than the group's %d MB of disk", logs, g.EphemeralDisk.SizeMB)
	}
	c.mainTask(g.Tasks, path)
	c.servingPorts(g, path)
	c.measurable(g, join(path, "scaling"))
	c.services(out, g, in, path)
	return g
}

func (c *checker) task(endless bool, g *cluster.TaskGroup, in *api.Task, groupRestart *api.RestartPolicy, path string) *cluster.Task {
	t := &cluster.Task{
		Name:          in.Name,
		Driver:        in.Driver,
		User:          in.User,
		Env:           c.env(in.Env, join(path, "env")),
		Constraints:   c.constraints(in.Constraints, path, levelTask),
		Affinities:    c.affinities(in.Affinities, path, levelTask),
		Resources:     c.resources(in.Resources, join(path, "resources")),
		RestartPolicy: copyOf(g.RestartPolicy),
		Meta:          c.meta(in.Meta, join(path, "meta"), levelTask),
		KillTimeout:   or(in.KillTimeout, 5*time.Second),
		KillSignal:    c.signal(in.KillSignal, join(path, "kill_signal")),
		LogConfig:     c.logs(in.LogConfig, join(path, "logs")),
		Leader:        in.Leader,
		Lifecycle:     c.lifecycle(in, path),
		ShutdownDelay: in.ShutdownDelay,
	}
	if in.RestartPolicy != nil {
		t.RestartPolicy = c.restart(endless, groupRestart, in.RestartPolicy, join(path, "restart"))
	}
	c.notNegative(t.KillTimeout, join(path, "kill_timeout"))
	c.notNegative(t.ShutdownDelay, join(path, "shutdown_delay"))
	c.driver(t, in.Config, path)
	artifacts := present(in.Artifacts)
	for i, a := range artifacts {
		t.Artifacts = append(t.Artifacts, c.artifact(a, element(join(path, "artifact"), i, len(artifacts))))
	}
	templates := present(in.Templates)
	for i, tmpl := range templates {
		t.Templates = append(t.Templates, c.template(tmpl, element(join(path, "template"), i, len(templates))))
	}
	return t
}

// restart merges the group's block and the task's over the defaults.
func (c *checker) restart(endless bool, group, task *api.RestartPolicy, path string) *cluster.RestartPolicy {
	r := &cluster.RestartPolicy{Attempts: 3, Interval: 24 * time.Hour, Delay: 15 * time.Second, Mode: "fail"}
	if endless {
		r.Attempts, r.Interval = 2, 30*time.Minute
	}
	for _, in := range []*api.RestartPolicy{group, task} {
		if in != nil {
			r.Attempts, r.Interval = or(in.Attempts, r.Attempts), or(in.Interval, r.Interval)
			r.Delay, r.Mode = or(in.Delay, r.Delay), or(in.Mode, r.Mode)
		}
	}
	if r.Attempts < 0 {
		c.fault(join(path, "attempts"), "must not be negative")
	}
	c.notNegative(r.Delay, join(path, "delay"))
	c.oneOf(r.Mode, join(path, "mode"), "fail", "delay")
	if r.Attempts == 0 && r.Mode == "delay" {
		c.fault(join(path, "mode"), `with "delay" the attempts must be at least 1`)
	}
	switch {
	case r.Interval < 5*time.Second:
		c.fault(join(path, "interval"), "is %v; it must be at least 5s", r.Interval)
	case r.Attempts > 0 && r.Delay > r.Interval/time.Duration(r.Attempts):
		c.fault(join(path, "interval"), "is %v, too short for %d attempts with a delay of %v each", r.Interval, r.Attempts, r.Delay)
	}
	return r
}

func (c *checker) reschedule(jobType string, job, group *api.ReschedulePolicy, path string) *cluster.ReschedulePolicy {
	r := &cluster.ReschedulePolicy{Delay: 30 * time.Second, DelayFunction: "exponential", MaxDelay: time.Hour, Unlimited: true}
	if jobType == cluster.JobTypeSystem || jobType == cluster.JobTypeSysBatch {
		return nil // perNode refuses the block
	}
	if jobType == cluster.JobTypeBatch {
		r = &cluster.ReschedulePolicy{Attempts: 1, Interval: 24 * time.Hour, Delay: 5 * time.Second, DelayFunction: "constant"}
	}
	for _, in := range []*api.ReschedulePolicy{job, group} {
		if in != nil {
			r.Attempts, r.Interval, r.Delay = or(in.Attempts, r.Attempts), or(in.Interval, r.Interval), or(in.Delay, r.Delay)
			r.DelayFunction, r.MaxDelay, r.Unlimited = or(in.DelayFunction, r.DelayFunction), or(in.MaxDelay, r.MaxDelay), or(in.Unlimited, r.Unlimited)
		}
	}
	c.oneOf(r.DelayFunction, join(path, "delay_function"), "constant", "exponential", "fibonacci")
	if r.Attempts < 0 {
		c.fault(join(path, "attempts"), "must not be negative")
	}
	switch {
	case r.Attempts > 0 && r.Unlimited:
		c.fault(join(path, "attempts"), "means nothing while the attempts are unlimited; set unlimited = false")
	case r.Attempts > 0 && r.Interval <= 0:
		c.fault(join(path, "interval"), "must be above zero where attempts are counted")
	}
	if r.Attempts == 0 && !r.Unlimited {
		return r // never rescheduled: the delays mean nothing
	}
	if r.Delay < 5*time.Second {
		c.fault(join(path, "delay"), "is %v; it must be at least 5s", r.Delay)
	}
	if r.DelayFunction != "constant" && r.MaxDelay < r.Delay {
		c.fault(join(path, "max_delay"), "is %v; it must not be less than the delay of %v", r.MaxDelay, r.Delay)
	}
	return r
}

func (c *checker) update(jobType string, job, group *api.UpdateStrategy, count int, path string) *cluster.UpdateStrategy {
	switch {
	case jobType == cluster.JobTypeSystem || jobType == cluster.JobTypeSysBatch:
		return c.stagger(job, group, path)
	case jobType != cluster.JobTypeService:
		if jobType == cluster.JobTypeBatch && (!job.Empty() || !group.Empty()) {
			c.fault(path, "jobs of type batch have no update block")
		}
		return nil
	}
	u := &cluster.UpdateStrategy{
		Stagger: 30 * time.Second, MaxParallel: 1, HealthCheck: "checks",
		MinHealthyTime: 10 * time.Second, HealthyDeadline: 5 * time.Minute, ProgressDeadline: 10 * time.Minute,
	}
	given := false
	for _, in := range []*api.UpdateStrategy{job, group} {
		if !in.Empty() {
			u.Stagger, u.MaxParallel = or(in.Stagger, u.Stagger), or(in.MaxParallel, u.MaxParallel)
			u.HealthCheck, u.MinHealthyTime = or(in.HealthCheck, u.HealthCheck), or(in.MinHealthyTime, u.MinHealthyTime)
			u.HealthyDeadline, u.ProgressDeadline = or(in.HealthyDeadline, u.HealthyDeadline), or(in.ProgressDeadline, u.ProgressDeadline)
			u.Canary, u.AutoRevert, u.AutoPromote = or(in.Canary, u.Canary), or(in.AutoRevert, u.AutoRevert), or(in.AutoPromote, u.AutoPromote)
			given = given || in.MaxParallel != nil
		}
	}
	switch {
	case u.MaxParallel < 0:
		c.fault(join(path, "max_parallel"), "must not be negative")
	case u.MaxParallel == 0 && (u.Canary > 0 || u.AutoRevert):
		c.fault(join(path, "max_parallel"), "is 0, which means updates without deployments; canary and auto_revert need a deployment: make it 1 or more")
	case given && count > 0 && u.MaxParallel > count:
		c.warn(join(path, "max_parallel"), "is %d with a count of %d: a changed job replaces all of its allocations at once", u.MaxParallel, count)
	}
	if u.Canary < 0 || u.Canary > MaxCount {
		c.fault(join(path, "canary"), "is %d; it must be between 0 and %d", u.Canary, MaxCount)
	}
	if u.AutoPromote && u.Canary == 0 {
		c.fault(join(path, "auto_promote"), "needs canaries to promote: set canary")
	}
	c.oneOf(u.HealthCheck, join(path, "health_check"), "checks", "task_states", "manual")
	c.notNegative(u.MinHealthyTime, join(path, "min_healthy_time"))
	if u.Stagger <= 0 {
		c.fault(join(path, "stagger"), "must be above zero")
	}
	if u.MinHealthyTime >= u.HealthyDeadline {
		c.fault(join(path, "healthy_deadline"), "is %v; it must be longer than min_healthy_time, which is %v", u.HealthyDeadline, u.MinHealthyTime)
	}
	if u.ProgressDeadline != 0 && u.HealthyDeadline >= u.ProgressDeadline {
		c.fault(join(path, "progress_deadline"), "is %v; it must be longer than healthy_deadline, which is %v, or 0", u.ProgressDeadline, u.HealthyDeadline)
	}
	return u
}

func (c *checker) migrate(jobType string, job, group *api.MigrateStrategy, path string) *cluster.MigrateStrategy {
	if jobType != cluster.JobTypeService {
		if (job != nil || group != nil) && slices.Contains([]string{cluster.JobTypeBatch, cluster.JobTypeSystem, cluster.JobTypeSysBatch}, jobType) {
			c.fault(path, "only jobs of type service have a migrate block")
		}
		return nil
	}
	m := &cluster.MigrateStrategy{MaxParallel: 1, HealthCheck: "checks", MinHealthyTime: 10 * time.Second, HealthyDeadline: 5 * time.Minute}
	for _, in := range []*api.MigrateStrategy{job, group} {
		if in != nil {
			m.MaxParallel, m.HealthCheck = or(in.MaxParallel, m.MaxParallel), or(in.HealthCheck, m.HealthCheck)
			m.MinHealthyTime, m.HealthyDeadline = or(in.MinHealthyTime, m.MinHealthyTime), or(in.HealthyDeadline, m.HealthyDeadline)
		}
	}
	if m.MaxParallel < 0 {
		c.fault(join(path, "max_parallel"), "must not be negative")
	}
	c.oneOf(m.HealthCheck, join(path, "health_check"), "checks", "task_states")
	c.notNegative(m.MinHealthyTime, join(path, "min_healthy_time"))
	if m.MinHealthyTime >= m.HealthyDeadline {
		c.fault(join(path, "healthy_deadline"), "is %v; it must be longer than min_healthy_time, which is %v", m.HealthyDeadline, m.MinHealthyTime)
	}
	return m
}

// disconnect folds Nomad's older names of the same settings into the block: group
// max_client_disconnect is its lost_after, prevent_reschedule_on_lost its replace =
// false. A block that changes nothing gives nil.
func (c *checker) disconnect(in *api.TaskGroup, path string) *cluster.DisconnectStrategy {
	d := &cluster.DisconnectStrategy{Replace: true, Reconcile: cluster.ReconcileBestScore}
	at := join(path, "disconnect")
	lostAfter, prevent := in.MaxClientDisconnect, or(in.PreventRescheduleOnLost, false) //nolint:staticcheck // the older names are read on purpose
	for _, old := range []struct {
		name, now string
		set       bool
	}{
		{"max_client_disconnect", "lost_after", lostAfter != nil},
		{"prevent_reschedule_on_lost", "replace", prevent},
	} {
		if old.set && in.Disconnect != nil {
			c.fault(join(path, old.name), "cannot stand beside a disconnect block; use its %s", old.now)
		} else if old.set {
			c.warn(join(path, old.name), "is an old name; use disconnect { %s }", old.now)
		}
	}
	if lostAfter != nil {
		d.LostAfter = *lostAfter
		c.notNegative(d.LostAfter, join(path, "max_client_disconnect"))
	}
	if prevent {
		d.Replace = false
	}
	if b := in.Disconnect; b != nil {
		d.LostAfter, d.Replace = or(b.LostAfter, 0), or(b.Replace, true)
		d.Reconcile = or(b.Reconcile, cluster.ReconcileBestScore)
		c.notNegative(d.LostAfter, join(at, "lost_after"))
		c.oneOf(d.Reconcile, join(at, "reconcile"), cluster.ReconcileBestScore, cluster.ReconcileKeepOriginal,
			cluster.ReconcileKeepReplacement, cluster.ReconcileLongestRunning)
	}
	if d.LostAfter == 0 && d.Replace {
		if in.Disconnect != nil {
			c.warn(at, "changes nothing without lost_after or replace = false")
		}
		return nil
	}
	return d
}

func (c *checker) disk(in *api.EphemeralDisk, path string) *cluster.EphemeralDisk {
	d := &cluster.EphemeralDisk{SizeMB: 300}
	if in != nil {
		d.SizeMB = or(in.SizeMB, d.SizeMB)
	}
	if d.SizeMB < 10 {
		c.fault(join(path, "size"), "is %d MB; it must be at least 10", d.SizeMB)
	}
	return d
}

func (c *checker) logs(in *api.LogConfig, path string) *cluster.LogConfig {
	l := &cluster.LogConfig{MaxFiles: 10, MaxFileSizeMB: 10}
	if in != nil {
		l.MaxFiles, l.MaxFileSizeMB = or(in.MaxFiles, l.MaxFiles), or(in.MaxFileSizeMB, l.MaxFileSizeMB)
		l.Disabled = or(in.Disabled, false)
	}
	if l.MaxFiles < 1 || l.MaxFiles > MaxLogFiles {
		c.fault(join(path, "max_files"), "is %d; it must be between 1 and %d", l.MaxFiles, MaxLogFiles)
	}
	if l.MaxFileSizeMB < 1 || l.MaxFileSizeMB > MaxLogFileMB {
		c.fault(join(path, "max_file_size"), "is %d MB; it must be between 1 and %d", l.MaxFileSizeMB, MaxLogFileMB)
	}
	return l
}

func (c *checker) resources(in *api.Resources, path string) *cluster.Resources {
	r := &cluster.Resources{CPU: 100, MemoryMB: 300}
	if in == nil {
		return r
	}
	r.CPU, r.MemoryMB = or(in.CPU, r.CPU), or(in.MemoryMB, r.MemoryMB)
	if r.CPU < 1 && or(in.Cores, 0) == 0 { // with cores the fault is another
		c.fault(join(path, "cpu"), "is %d MHz; it must be at least 1", r.CPU)
	}
	if r.MemoryMB < 10 {
		c.fault(join(path, "memory"), "is %d MB; it must be at least 10", r.MemoryMB)
	}
	for _, d := range present(in.Devices) {
		r.Devices = append(r.Devices, c.device(d, join(path, join("device", d.Name))))
	}
	c.shares(r.Devices, path)
	return r
}

func copyOf[T any](p *T) *T {
	v := *p
	return &v
}
