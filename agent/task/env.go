package task

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/rxvision/rxvision/cluster"
)

// hostVariables are what a task inherits of the agent's environment; everything
// else there (credentials, settings of the agent) is its own business.
var hostVariables = []string{"PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ"}

// Env is a task's environment and what its job's text may refer to: variables by
// ${NAME} or ${env["NAME"]}, the node by ${node.…}, ${attr.…} and ${meta.…}.
type Env struct {
	vars map[string]string
	node map[string]string
}

// NewEnv builds the environment of a task as Nomad documents it
// (https://developer.hashicorp.com/nomad/docs/reference/runtime-environment-settings).
func NewEnv(node *cluster.Node, region string, job *cluster.Job, alloc *cluster.Allocation, task *cluster.Task, dir Dir) *Env {
	e := &Env{vars: map[string]string{}, node: nodeVariables(node, region)}
	for _, name := range hostVariables {
		if v, ok := os.LookupEnv(name); ok {
			e.vars[name] = v
		}
	}
	e.set("TMPDIR", dir.Tmp())
	e.set("NOMAD_ALLOC_DIR", dir.Shared())
	e.set("NOMAD_TASK_DIR", dir.Local())
	e.set("NOMAD_SECRETS_DIR", dir.Secrets())
	e.set("NOMAD_ALLOC_ID", alloc.ID)
	e.set("NOMAD_SHORT_ALLOC_ID", alloc.ID[:min(8, len(alloc.ID))])
	e.set("NOMAD_ALLOC_NAME", alloc.Name)
	if i := cluster.IndexOf(alloc.Name); i >= 0 {
		e.set("NOMAD_ALLOC_INDEX", strconv.Itoa(i))
	}
	e.set("NOMAD_GROUP_NAME", alloc.TaskGroup)
	e.set("NOMAD_TASK_NAME", task.Name)
	e.set("NOMAD_JOB_ID", alloc.JobID)
	e.set("NOMAD_JOB_NAME", job.Name)
	if job.ParentID != "" {
		e.set("NOMAD_JOB_PARENT_ID", job.ParentID)
	}
	e.set("NOMAD_NAMESPACE", alloc.Namespace)
	e.set("NOMAD_REGION", region)
	e.set("NOMAD_DC", node.Datacenter)
	if ar := alloc.AllocatedResources; ar != nil {
		if t := ar.Tasks[task.Name]; t != nil {
			e.set("NOMAD_CPU_LIMIT", strconv.FormatInt(t.Cpu.CpuShares, 10))
			e.set("NOMAD_MEMORY_LIMIT", strconv.FormatInt(t.Memory.MemoryMB, 10))
			if t.Memory.MemoryMaxMB > 0 {
				e.set("NOMAD_MEMORY_MAX_LIMIT", strconv.FormatInt(t.Memory.MemoryMaxMB, 10))
			}
		}
		for _, p := range ar.Shared.Ports {
			e.port(p)
		}
	}
	if g := job.Group(alloc.TaskGroup); g != nil && g.Gang != nil {
		e.set("RX_GANG_SIZE", strconv.Itoa(g.Count))
		e.set("RX_GANG_RANK", strconv.Itoa(cluster.IndexOf(alloc.Name)))
	}
	if g := job.Group(alloc.TaskGroup); g != nil && g.MaxRunDuration > 0 {
		e.set("RX_MAX_RUN_DURATION", strconv.FormatFloat(g.MaxRunDuration.Seconds(), 'f', -1, 64))
	}
	if c := alloc.Checkpoints[task.Name]; c != nil {
		e.set("RX_CHECKPOINT_STEP", strconv.FormatInt(c.Step, 10))
		e.set("RX_CHECKPOINT_PATH", c.Path)
	}
	e.meta(job, alloc.TaskGroup, task)
	for _, name := range slices.Sorted(maps.Keys(task.Env)) {
		e.set(name, e.Expand(task.Env[name]))
	}
	e.devices(allocated(alloc, task.Name))
	return e
}

// port sets a port's variables. Only host networking exists, so that the port
// inside is the port outside.
func (e *Env) port(p cluster.PortMapping) {
	ip, port := p.HostIP, strconv.Itoa(p.Value)
	addr := net.JoinHostPort(ip, port)
	for prefix, value := range map[string]string{
		"NOMAD_IP_": ip, "NOMAD_HOST_IP_": ip,
		"NOMAD_PORT_": port, "NOMAD_HOST_PORT_": port, "NOMAD_ALLOC_PORT_": port,
		"NOMAD_ADDR_": addr, "NOMAD_HOST_ADDR_": addr, "NOMAD_ALLOC_ADDR_": addr,
	} {
		e.set(prefix+p.Label, value)
	}
}

// meta sets NOMAD_META_… of job, group and task, the narrower one winning, in the
// key's own spelling and in capitals. What a dispatch could give and did not is empty.
func (e *Env) meta(job *cluster.Job, group string, task *cluster.Task) {
	all := map[string]string{}
	if job.Dispatched && job.ParameterizedJob != nil {
		for _, key := range job.ParameterizedJob.MetaOptional {
			all[key] = ""
		}
	}
	maps.Copy(all, job.Meta)
	if g := job.Group(group); g != nil {
		maps.Copy(all, g.Meta)
	}
	maps.Copy(all, task.Meta)
	for _, k := range slices.Sorted(maps.Keys(all)) {
		v := e.Expand(all[k])
		e.set("NOMAD_META_"+k, v)
		e.set("NOMAD_META_"+strings.ToUpper(k), v)
	}
}

// devices tells the NVIDIA libraries which GPUs the task has, and of which share the
// task is to keep to itself. They are set last: a job cannot give itself more. The CUDA_MPS_
// variables hold where the host runs NVIDIA's Multi-Process Service
// (https://docs.nvidia.com/deploy/mps/); nothing else holds a task to its share.
func (e *Env) devices(devices []*cluster.AllocatedDevice) {
	var ids []string
	var milli, mib int64
	for _, d := range devices {
		ids = append(ids, d.DeviceIDs...)
		milli, mib = milli+d.Milli, mib+d.MiB
	}
	if len(ids) == 0 {
		e.vars["NVIDIA_VISIBLE_DEVICES"] = "none"
		e.vars["CUDA_VISIBLE_DEVICES"] = "-1"
		return
	}
	list := strings.Join(ids, ",")
	e.vars["NVIDIA_VISIBLE_DEVICES"] = list
	e.vars["CUDA_VISIBLE_DEVICES"] = list
	if milli > 0 {
		e.vars["RX_GPU_MILLI"] = strconv.FormatInt(milli, 10)
		e.vars["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = strconv.FormatInt(max(milli/10, 1), 10)
	}
	if mib > 0 {
		e.vars["RX_GPU_MIB"] = strconv.FormatInt(mib, 10)
		e.vars["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] = fmt.Sprintf("0=%dM", mib) // of the only device that the task sees
	}
}

// Devices lists the IDs of the GPUs that a task was allocated, in order.
func Devices(alloc *cluster.Allocation, task string) []string {
	var ids []string
	for _, d := range allocated(alloc, task) {
		ids = append(ids, d.DeviceIDs...)
	}
	return ids
}

func allocated(alloc *cluster.Allocation, task string) []*cluster.AllocatedDevice {
	if alloc.AllocatedResources == nil || alloc.AllocatedResources.Tasks[task] == nil {
		return nil
	}
	return alloc.AllocatedResources.Tasks[task].Devices
}

func nodeVariables(n *cluster.Node, region string) map[string]string {
	vars := map[string]string{
		"node.unique.id": n.ID, "node.unique.name": n.Name, "node.datacenter": n.Datacenter,
		"node.class": n.NodeClass, "node.pool": n.NodePool, "node.region": region,
	}
	for k, v := range n.Attributes {
		vars["attr."+k] = v
	}
	for k, v := range n.Meta {
		vars["meta."+k] = v
	}
	return vars
}

// set adds a variable; what the name may not hold becomes an underscore.
func (e *Env) set(name, value string) {
	clean := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '_', r == '.':
			return r
		}
		return '_'
	}, name)
	e.vars[clean] = value
}

// deviceVariables say which GPUs a task has, and what share of one.
var deviceVariables = []string{
	"NVIDIA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "RX_GPU_MILLI", "RX_GPU_MIB", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT",
}

// add takes variables from a template; those of the devices stay as they are.
func (e *Env) add(vars map[string]string) {
	for k, v := range vars {
		if _, is := e.vars[k]; !is || !slices.Contains(deviceVariables, k) {
			e.set(k, v)
		}
	}
}

// Get returns a variable.
func (e *Env) Get(name string) (string, bool) {
	v, ok := e.vars[name]
	return v, ok
}

// List returns the environment as "NAME=value", sorted.
func (e *Env) List() []string {
	out := make([]string, 0, len(e.vars))
	for k, v := range e.vars {
		out = append(out, k+"="+v)
	}
	slices.Sort(out)
	return out
}

var reference = regexp.MustCompile(`\$\{(?:env\["([^"\]]+)"\]|([a-zA-Z0-9_./-]+))\}`)

// Expand replaces ${…} references. One that names nothing known is left as it
// stands, as Nomad leaves it.
func (e *Env) Expand(s string) string {
	if !strings.Contains(s, "${") {
		return s
	}
	return reference.ReplaceAllStringFunc(s, func(ref string) string {
		m := reference.FindStringSubmatch(ref)
		if v, ok := e.vars[m[1]]; m[1] != "" && ok {
			return v
		}
		if v, ok := e.vars[m[2]]; ok {
			return v
		}
		if v, ok := e.node[m[2]]; ok {
			return v
		}
		return ref
	})
}

// Decode expands every string of a driver's config block and decodes it into v;
// a key that v does not have is an error.
func (e *Env) Decode(config json.RawMessage, v any) error {
	if len(config) == 0 {
		config = json.RawMessage("{}")
	}
	var tree any
	if err := json.Unmarshal(config, &tree); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	expanded, err := json.Marshal(e.expandTree(tree))
	if err != nil {
		return fmt.Errorf("config: %w", err)
	}
	d := json.NewDecoder(strings.NewReader(string(expanded)))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("config: %w", err)
	}
	return nil
}

func (e *Env) expandTree(v any) any {
	switch v := v.(type) {
	case string:
		return e.Expand(v)
	case []any:
		for i := range v {
			v[i] = e.expandTree(v[i])
		}
	case map[string]any:
		for k := range v {
			v[k] = e.expandTree(v[k])
		}
	}
	return v
}
