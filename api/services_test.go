package api_test

import (
	"fmt"
	"strings"
	"testing"

	nomad "github.com/hashicorp/nomad/api"

	"github.com/rxvision/rxvision/cluster"
)

const servicesJob = `
    service {
      name     = "web"
      provider = "nomad"
      port     = "http"
      tags     = ["blue"]
      check {
        name     = "alive"
        type     = "http"
        path     = "/"
        interval = "10s"
        timeout  = "1s"
      }
    }
    task "t" {
      service {
        provider = "nomad"
      }
`

// TestCommandLineServices registers a job with services, finds them, and sees them go with it.
func TestCommandLineServices(t *testing.T) {
	c := newCLI(t)
	c.until("the server says what it knows", func(snap *cluster.Snapshot) bool { return snap.Rules() == cluster.CurrentRules })
	c.run("service list", "No service registrations found")
	text := strings.Replace(webJob, "\n    task \"t\" {\n", servicesJob, 1)
	c.file("web.hcl", text)
	c.fails(1, "job plan web.hcl", "+ Job: \"web\"")
	c.run("job run web.hcl", "Status = successful")
	c.settled("web", 2)
	c.run("service list", "web [blue]", "web-g-t []")
	out := c.run("service info web", "web", "[blue]")
	for _, a := range c.store.State().Snapshot().AllocsByJob(nil, cluster.JobKey{Namespace: "default", ID: "web"}) {
		port := a.AllocatedResources.Shared.Ports[0]
		if want := fmt.Sprintf("%s:%d", port.HostIP, port.Value); !strings.Contains(out, want) || !strings.Contains(out, a.ID[:8]) {
			t.Errorf("service info does not say that %s is at %s:\n%s", a.ID, want, out)
		}
	}
	c.fails(1, "service info nope", `No service registrations with prefix "nope" found`)
	client, err := nomad.NewClient(&nomad.Config{Address: c.url})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	one := func(key string) string {
		regs, _, err := client.Services().Get("web", &nomad.QueryOptions{Params: map[string]string{"choose": "1|" + key}})
		if err != nil || len(regs) != 1 {
			t.Fatalf("choose one: %v, %v", regs, err)
		}
		return regs[0].ID
	}
	some := map[string]bool{}
	for i := range 64 {
		key := fmt.Sprint("key", i)
		first, second := one(key), one(key)
		if first != second {
			t.Errorf("key %s has two places", key)
		}
		some[first] = true
	}
	if len(some) != 2 {
		t.Errorf("64 keys all choose %v", some)
	}
	if _, _, err := client.Services().Get("web", &nomad.QueryOptions{Params: map[string]string{"choose": "none"}}); err == nil || !strings.Contains(err.Error(), "NUMBER|KEY") {
		t.Errorf("choose=none: %v", err)
	}
	c.fails(1, "service delete web "+one("x"), "services are registered while their allocations run")

	// What inspect prints can be run again and changes nothing.
	c.file("again.json", c.run("job inspect web"))
	c.fails(0, "job plan -json again.json", "Job: \"web\"")
	c.file("web.hcl", strings.Replace(text, `"blue"`, `"green"`, 1))
	c.run("job plan web.hcl", "2 in-place update", `"green"`)
	c.run("job run -detach web.hcl")
	c.until("the tags change in place", func(snap *cluster.Snapshot) bool {
		regs := snap.JobServices(nil, cluster.JobKey{Namespace: "default", ID: "web"})
		return len(regs) == 4 && len(regs[0].Tags)+len(regs[1].Tags) == 1 && strings.Contains(fmt.Sprint(regs[0].Tags, regs[1].Tags), "green")
	})
	c.run("job stop -detach web")
	c.until("nothing is registered", func(snap *cluster.Snapshot) bool { return len(snap.Services(nil, "*")) == 0 })
}
