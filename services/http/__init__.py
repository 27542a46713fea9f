"""The HTTP front: REST and server-sent events, a stateless client of the gateway. Several run side by side.

A package of its API, such as services.http.rest, is a folder that has a function `package(front) -> Package`.
services.http.app has the list. What such a function needs:

- `Package` and `Resource` of services.http.resources: the paths, and a coroutine function for each method of a path.
  `{id:id}` in a path is a job's id, which may hold `/`.
- `front.gateway.of(request)` of services.http.gateway: calls the gateway with the credential of the request.
- services.http.failures: the one table from gRPC's codes to HTTP's. A handler raises Failure, or lets durable_llm's
  ApiError pass; the package says in its `answer` which body such an error gets.
- `read_object` of services.http.bodies: reads the JSON body of a request.
- services.http.events: writes server-sent events.
"""
