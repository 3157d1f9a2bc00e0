// The search runs in a Worker, which browsers refuse to pages that were opened from the file system: there, run it in an iframe.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.appendChild(this.frame);
      const scope = this.frame.contentWindow;
      scope.postMessage = (data) => this.receive(data);
      this.ready = new Promise((resolve) => {
        const script = scope.document.createElement("script");
        script.src = new URL(url, document.baseURI);
        script.onload = resolve;
        scope.document.body.appendChild(script);
      });
    }
    receive(data) {
      const event = new MessageEvent("message", { data });
      this.dispatchEvent(event);
      if (this.onmessage) this.onmessage(event);
    }
    postMessage(data) {
      const scope = this.frame.contentWindow;
      this.ready.then(() => scope.dispatchEvent(new scope.MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
