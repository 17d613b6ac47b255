package task

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rxvision/rxvision/cluster"
)

func exampleNode() *cluster.Node {
	return &cluster.Node{
		ID: "n-1", Name: "here", Datacenter: "dc1", NodePool: "default", NodeClass: "big",
		Attributes: map[string]string{"kernel.name": "linux"}, Meta: map[string]string{"rack": "r7"},
	}
}

func exampleAlloc(taskName string) *cluster.Allocation {
	return &cluster.Allocation{
		ID: "0f43382e-67e5-efac-7b92-e754dc4a5431", Name: "web.g[3]", Namespace: "default", JobID: "web", TaskGroup: "g",
		AllocatedResources: &cluster.AllocatedResources{
			Tasks: map[string]*cluster.AllocatedTaskResources{taskName: {
				Cpu: cluster.AllocatedCPU{CpuShares: 250}, Memory: cluster.AllocatedMemory{MemoryMB: 128, MemoryMaxMB: 256},
			}},
			Shared: cluster.AllocatedSharedResources{Ports: []cluster.PortMapping{{Label: "http-api", Value: 20123, HostIP: "127.0.0.1"}}},
		},
	}
}

func exampleJob(t *cluster.Task) *cluster.Job {
	return &cluster.Job{
		ID: "web", Name: "web", Namespace: "default", Meta: map[string]string{"owner": "job", "Tier": "job"},
		TaskGroups: []*cluster.TaskGroup{{Name: "g", Meta: map[string]string{"Tier": "group"}, Tasks: []*cluster.Task{t}}},
	}
}

func exampleEnv(t *testing.T, spec *cluster.Task) (*Env, Dir) {
	t.Helper()
	dir := AllocDir(t.TempDir()).Task(spec.Name)
	if err := AllocDir(filepath.Dir(dir.Root())).Build(); err != nil {
		t.Fatal(err)
	}
	if err := dir.Build(""); err != nil {
		t.Fatal(err)
	}
	return NewEnv(exampleNode(), "global", exampleJob(spec), exampleAlloc(spec.Name), spec, dir), dir
}

func TestEnvironmentIsNomads(t *testing.T) {
	t.Setenv("RXVISION_TOKEN", "secret")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "secret")
	t.Setenv("LANG", "C.UTF-8")
	spec := &cluster.Task{
		Name: "t", Meta: map[string]string{"who": "${node.unique.name}"},
		Env: map[string]string{
			"URL": "http://${NOMAD_ADDR_http_api}/${meta.rack}", "K": `${attr.kernel.name} ${env["NOMAD_TASK_NAME"]}`,
			"UNKNOWN": "${nosuch.thing}", "bad-name": "x", "CUDA_VISIBLE_DEVICES": "0,1,2",
		},
	}
	e, dir := exampleEnv(t, spec)
	for name, want := range map[string]string{
		"NOMAD_ALLOC_ID": "0f43382e-67e5-efac-7b92-e754dc4a5431", "NOMAD_SHORT_ALLOC_ID": "0f43382e",
		"NOMAD_ALLOC_NAME": "web.g[3]", "NOMAD_ALLOC_INDEX": "3", "NOMAD_JOB_ID": "web", "NOMAD_JOB_NAME": "web",
		"NOMAD_GROUP_NAME": "g", "NOMAD_TASK_NAME": "t", "NOMAD_DC": "dc1", "NOMAD_REGION": "global", "NOMAD_NAMESPACE": "default",
		"NOMAD_CPU_LIMIT": "250", "NOMAD_MEMORY_LIMIT": "128", "NOMAD_MEMORY_MAX_LIMIT": "256",
		"NOMAD_TASK_DIR": dir.Local(), "NOMAD_SECRETS_DIR": dir.Secrets(), "NOMAD_ALLOC_DIR": dir.Shared(),
		"NOMAD_PORT_http_api": "20123", "NOMAD_HOST_PORT_http_api": "20123", "NOMAD_IP_http_api": "127.0.0.1", "NOMAD_ADDR_http_api": "127.0.0.1:20123",
		"NOMAD_META_owner": "job", "NOMAD_META_OWNER": "job", "NOMAD_META_TIER": "group", "NOMAD_META_WHO": "here",
		"URL": "http://127.0.0.1:20123/r7", "K": "linux t", "UNKNOWN": "${nosuch.thing}", "bad_name": "x", "LANG": "C.UTF-8",
		"CUDA_VISIBLE_DEVICES": "-1", "NVIDIA_VISIBLE_DEVICES": "none",
	} {
		if got, _ := e.Get(name); got != want {
			t.Errorf("%s = %q, want %q", name, got, want)
		}
	}
	if i := slices.IndexFunc(e.List(), func(kv string) bool { return strings.HasSuffix(kv, "=secret") }); i >= 0 {
		t.Errorf("the agent's environment reached the task: %s", e.List()[i])
	}
}

func TestTaskSeesItsOwnDevicesOnly(t *testing.T) {
	spec := &cluster.Task{Name: "t", Env: map[string]string{"CUDA_VISIBLE_DEVICES": "all"}}
	alloc := exampleAlloc("t")
	alloc.AllocatedResources.Tasks["t"].Devices = []*cluster.AllocatedDevice{{Vendor: "nvidia", Type: "gpu", Name: "H100", DeviceIDs: []string{"GPU-a", "GPU-b"}}}
	e := NewEnv(exampleNode(), "global", exampleJob(spec), alloc, spec, AllocDir("/x").Task("t"))
	e.add(map[string]string{"NVIDIA_VISIBLE_DEVICES": "all"})
	for _, name := range []string{"CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"} {
		if got, _ := e.Get(name); got != "GPU-a,GPU-b" {
			t.Errorf("%s = %q", name, got)
		}
	}
}

// A share is said in words that NVIDIA's Multi-Process Service takes, and the job cannot widen it.
func TestTaskIsToldItsShare(t *testing.T) {
	spec := &cluster.Task{Name: "t", Env: map[string]string{"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "100"}}
	alloc := exampleAlloc("t")
	alloc.AllocatedResources.Tasks["t"].Devices = []*cluster.AllocatedDevice{{Vendor: "nvidia", Type: "gpu", Name: "H100", DeviceIDs: []string{"GPU-a"}, Milli: 255, MiB: 4096}}
	e := NewEnv(exampleNode(), "global", exampleJob(spec), alloc, spec, AllocDir("/x").Task("t"))
	e.add(map[string]string{"RX_GPU_MIB": "80000", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=80000M"})
	for name, want := range map[string]string{
		"CUDA_VISIBLE_DEVICES": "GPU-a", "RX_GPU_MILLI": "255", "RX_GPU_MIB": "4096",
		"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "25", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": "0=4096M",
	} {
		if got, _ := e.Get(name); got != want {
			t.Errorf("%s = %q, want %q", name, got, want)
		}
	}
}

func TestDecodeExpandsAndIsStrict(t *testing.T) {
	e, _ := exampleEnv(t, &cluster.Task{Name: "t"})
	var c commandConfig
	if err := e.Decode(json.RawMessage(`{"command":"/bin/${attr.kernel.name}","args":["-p","${NOMAD_PORT_http_api}"]}`), &c); err != nil {
		t.Fatal(err)
	}
	if c.Command != "/bin/linux" || !slices.Equal(c.Args, []string{"-p", "20123"}) {
		t.Errorf("got %+v", c)
	}
	if err := e.Decode(json.RawMessage(`{"comand":"x"}`), &c); err == nil || !strings.Contains(err.Error(), "comand") {
		t.Errorf("unknown key: %v", err)
	}
}

func TestTemplates(t *testing.T) {
	spec := &cluster.Task{Name: "t", Env: map[string]string{"COLOUR": "blue"}}
	for _, c := range []struct{ source, want, fault string }{
		{source: `c={{ env "COLOUR" }} {{env "NOPE"}}`, want: "c=blue "},
		{source: `{{ if env "NOPE" }}a{{ else }}{{ env "COLOUR" | toUpper }}{{ end }}`, want: "BLUE"},
		{source: `{{ envOrDefault "NOPE" "d" }}`, want: "d"},
		{source: `{{ mustEnv "NOPE" }}`, fault: `"NOPE" is not set`},
		{source: `{{ key "a/b" }}`, fault: `function "key" not defined (supported functions are env`},
		{source: `{{ range 1000000000 }}{{ end }}`, fault: "not supported"},
		{source: `{{ if true }}{{ range 9 }}x{{ end }}{{ end }}`, fault: "not supported"},
		{source: `{{ define "x" }}{{ end }}`, fault: "not supported"},
		{source: `{{ env "COLOUR" `, fault: "unclosed action"},
		{source: strings.Repeat("x", maxTemplate+1), fault: "over"},
	} {
		e, dir := exampleEnv(t, spec)
		err := RenderTemplates([]*cluster.Template{{EmbeddedTmpl: c.source, DestPath: "local/out/x.conf", Perms: "0600"}}, dir, e)
		name := c.source[:min(40, len(c.source))]
		if c.fault != "" {
			if err == nil || !strings.Contains(err.Error(), c.fault) {
				t.Errorf("%s: error %v, want one with %q", name, err, c.fault)
			}
			continue
		}
		got, readErr := os.ReadFile(filepath.Join(dir.Local(), "out/x.conf"))
		if err != nil || readErr != nil || string(got) != c.want {
			t.Errorf("%s: got %q, %v, %v, want %q", name, got, err, readErr, c.want)
		}
	}
}

func TestTemplateVariablesAndPlaces(t *testing.T) {
	e, dir := exampleEnv(t, &cluster.Task{Name: "t"})
	templates := []*cluster.Template{
		{EmbeddedTmpl: "# c\nexport A=1\nB=\"two words\"\n", DestPath: "${NOMAD_SECRETS_DIR}/vars", Envvars: true, Perms: "400"},
		{EmbeddedTmpl: `[[ env "B" ]]`, LeftDelim: "[[", RightDelim: "]]", DestPath: "/local/b"},
	}
	for range 2 { // a restart renders again over read-only files
		if err := RenderTemplates(templates, dir, e); err != nil {
			t.Fatal(err)
		}
	}
	if got, _ := os.ReadFile(filepath.Join(dir.Local(), "b")); string(got) != "two words" {
		t.Errorf("got %q", got)
	}
	if fi, err := os.Stat(filepath.Join(dir.Secrets(), "vars")); err != nil || fi.Mode().Perm() != 0o400 {
		t.Errorf("mode: %v %v", fi.Mode(), err)
	}
	if v, _ := e.Get("A"); v != "1" {
		t.Errorf("A = %q", v)
	}
	for _, dest := range []string{"../x", "local/../../x", ""} {
		if err := RenderTemplates([]*cluster.Template{{DestPath: dest}}, dir, e); err == nil {
			t.Errorf("destination %q was accepted", dest)
		}
	}
	if err := os.Symlink("/tmp", filepath.Join(dir.Local(), "out")); err != nil {
		t.Fatal(err)
	}
	if err := RenderTemplates([]*cluster.Template{{DestPath: "local/out/x"}}, dir, e); err == nil {
		t.Error("a template was written through a symbolic link out of the directory")
	}
}

func TestNamesAndSignals(t *testing.T) {
	for _, bad := range []string{"", ".", "..", "alloc", "a/b", "a\\b", "a\nb", strings.Repeat("x", 129)} {
		if CheckName(bad) == nil {
			t.Errorf("task name %q was accepted", bad)
		}
	}
	for rel, want := range map[string]bool{"t/secrets/x": true, "t/secrets": true, "t/local/secrets": false, "alloc/secrets": false, "secrets": false} {
		if SecretsPath(rel) != want {
			t.Errorf("SecretsPath(%q) = %v", rel, !want)
		}
	}
	for name, want := range map[string]string{"hup": "hangup", "SIGUSR1": "user defined signal 1", "": "interrupt"} {
		if s, err := ParseSignal(name, 2); err != nil || s.String() != want {
			t.Errorf("%q: %v %v", name, s, err)
		}
	}
	if _, err := ParseSignal("SIGNOPE", 2); err == nil {
		t.Error("SIGNOPE is known")
	}
	if s, _ := StopSignal(&cluster.Task{Driver: DriverONNX}); s.String() != "terminated" {
		t.Errorf("workers are stopped by %v", s)
	}
}

// TestEnvironmentOfADispatchedJob: it knows its parent, and what a dispatch could give and did not is empty.
func TestEnvironmentOfADispatchedJob(t *testing.T) {
	spec := &cluster.Task{Name: "t"}
	job := exampleJob(spec)
	job.ParentID, job.Dispatched = "par", true
	job.ParameterizedJob = &cluster.ParameterizedJobConfig{MetaOptional: []string{"note", "owner"}}
	e := NewEnv(exampleNode(), "global", job, exampleAlloc("t"), spec, AllocDir("/x").Task("t"))
	for name, want := range map[string]string{"NOMAD_JOB_PARENT_ID": "par", "NOMAD_META_note": "", "NOMAD_META_NOTE": "", "NOMAD_META_owner": "job"} {
		if got, ok := e.Get(name); got != want || !ok {
			t.Errorf("%s = %q, %v, want %q", name, got, ok, want)
		}
	}
	job.Dispatched = false
	if _, ok := NewEnv(exampleNode(), "global", job, exampleAlloc("t"), spec, AllocDir("/x").Task("t")).Get("NOMAD_META_note"); ok {
		t.Error("a job that was not dispatched has what a dispatch could give")
	}
}
